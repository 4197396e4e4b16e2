"""A model as a recipe sees it: a plan that has not been run.

A checkpoint is a plan that copies, `model+adapter` is one that adds deltas, and the outcome of an
earlier document of a recipe is one, too. None of them needs to touch the disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any
from weakref import finalize

from weft.core.specs import AddDeltas, Checkpoint, Load, TensorRef, job_bytes
from weft.formats.checkpoint import read_json
from weft.formats.side_files import TEMPLATE, TOKENIZER, part_of
from weft.plan._stacks import Stack, stacks
from weft.plan._tied import Tie, find_tie
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weft.core.specs import Adapter, Expression, Plan, SideFile, TensorJob
    from weft.recipes.records import ModelName


_NOWHERE = ""  # the file of a tensor that is only planned


@dataclass(frozen=True)
class View:
    """A model that may stand in a recipe.

    Attributes:
        name: As the recipe spells it.
        plan: What its tensors and the files beside them are.
        config: Its `config.json`.
        tie: Which two names one table of the vocabulary has, if it has two.
        tokenizer: The folder with the files of its tokenizer; None if a document makes them.
        given: What its card credits: the base and the adapters that it is made from.
    """

    name: str
    plan: Plan = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    tie: Tie | None
    tokenizer: Path | None
    given: tuple[str, ...]

    @cached_property
    def tensors(self) -> dict[str, TensorJob]:
        """By name; a head that the config says is not used is none of them."""
        unused = self.tie.head if self.tie and self.tie.stored else None
        return {job.name: job for job in self.plan.jobs if job.name != unused}

    @cached_property
    def stacks(self) -> list[Stack]:
        """Its lists of layers."""
        return stacks(self.tensors, self.config)

    @cached_property
    def made_tokenizer(self) -> Path:
        """A folder with the tokenizer that a document makes: tokenizers are read from files.

        It goes with the view.
        """
        folder = Path(mkdtemp(prefix="weft-tokenizer-"))
        finalize(self, rmtree, folder, ignore_errors=True)
        for side in self.plan.side_files:
            path = folder / side.name
            if part_of(side.name) not in (TOKENIZER, TEMPLATE):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if side.text is None:
                path.symlink_to(Path(side.source or "").absolute())
            else:
                path.write_text(side.text, encoding="utf-8")
        return folder

    @property
    def vocabulary(self) -> int | None:
        """How many rows the embedding has, as the config says."""
        value = config_value(dict(self.config), "vocab_size")
        return value if isinstance(value, int) else None

    def tensor(self, name: str) -> TensorJob | None:
        """The tensor of this name; the head of a tied model is its embedding."""
        if self.tie and name == self.tie.head:
            return self.tensors[self.tie.embedding]
        return self.tensors.get(name)


def view(
    name: str, plan: Plan, base: Checkpoint, given: tuple[str, ...], architecture: str | None = None
) -> View:
    """The view of a checkpoint with adapters, whose merge `plan` describes."""
    config = _config(plan, base.config)
    if architecture:
        config["architectures"] = [architecture]
    tie = find_tie(replace(base, config=config), [])
    stored = {job.name for job in plan.jobs}
    if tie and not tie.stored and (tie.head in stored or not tie.known):
        tie = None
    beside = next(
        (Path(s.source).parent for s in plan.side_files if s.source and "tokenizer" in s.name), None
    )
    return View(name, plan, config, tie, beside or Path(base.folder), given)


def renamed(view: View, architecture: str | None) -> View:
    """The view of the same, under the `architectures` that a recipe says, if it does."""
    if architecture is None:
        return view
    return replace(view, config={**view.config, "architectures": [architecture]})


def outcome(name: str, plan: Plan, donor: View, given: tuple[str, ...]) -> View:
    """The view of what a recipe makes, for the documents after it."""
    config = _config(plan, donor.config)
    tie = None if config_value(config, "tie_word_embeddings") is False else donor.tie
    parts = (TOKENIZER, TEMPLATE)
    changed = any(s.text is not None and part_of(s.name) in parts for s in plan.side_files)
    return View(name, plan, config, tie, None if changed else donor.tokenizer, given)


def adapted(name: str, made: View, adapters: Sequence[tuple[Adapter, float]]) -> View:
    """The view of what an earlier document makes, with adapters on it.

    They are planned as if it lay on the disk; then what it is takes the place of what would be
    read there.
    """
    from weft.plan.merge import plan_merge

    jobs = {job.name: job for job in made.plan.jobs}
    config = dict(made.config)
    if config:  # the bytes of the two tables cannot be compared
        config["tie_word_embeddings"] = made.tie is not None
    has_config = made.tokenizer is not None and Path(made.tokenizer, "config.json").is_file()
    stand_in = Checkpoint(
        given=made.name,
        folder=str(made.tokenizer),
        tensors={
            n: TensorRef(_NOWHERE, n, j.dtype, j.shape, 0, job_bytes(j)) for n, j in jobs.items()
        },
        shards=(made.name,),
        metadata=dict(made.plan.metadata),
        config=config,
        side_files=("config.json",) if has_config else (),
        left_out=(),
        sources=(),
    )
    plan = plan_merge(stand_in, adapters)
    files = {side.name: side for side in made.plan.side_files}
    files |= {s.name: s for s in plan.side_files if s.name != "config.json" or s.text is not None}
    paths = {entry.path: entry for entry in (*plan.inputs, *made.plan.inputs)}
    plan = replace(
        plan,
        jobs=tuple(replace(job, expression=_grafted(job.expression, jobs)) for job in plan.jobs),
        side_files=tuple(files[name] for name in sorted(files)),
        inputs=tuple(paths.values()),
        notes=(*made.plan.notes, *plan.notes),
        warnings=(*made.plan.warnings, *plan.warnings),
        repairs=(*made.plan.repairs, *plan.repairs),
    )
    given = (*made.given, *(adapter.given for adapter, _ in adapters))
    return outcome(name, plan, made, given)


def _grafted(expression: Expression, jobs: Mapping[str, TensorJob]) -> Expression:
    """With what the tensors are in place of what would be read."""
    match expression:
        case AddDeltas():
            return replace(expression, base=_grafted(expression.base, jobs))
        case Load() if expression.ref.file == _NOWHERE:
            return jobs[expression.ref.name].expression
    return expression


def folders(views: Mapping[ModelName, View]) -> dict[ModelName, Path]:
    """Where the files of every model's tokenizer lie, for as long as the views live."""
    return {name: view.tokenizer or view.made_tokenizer for name, view in views.items()}


def lasting(files: Iterable[SideFile], views: Iterable[View]) -> list[SideFile]:
    """What came from the folder of a `made_tokenizer` as its document has it."""
    made = {
        f"{view.made_tokenizer}/{side.name}": side
        for view in views
        if "made_tokenizer" in vars(view)
        for side in view.plan.side_files
    }
    return [
        replace(made[side.source], name=side.name) if side.source in made else side
        for side in files
    ]


def _config(plan: Plan, stored: Mapping[str, Any]) -> dict[str, Any]:
    for side in plan.side_files:
        if side.name == "config.json":
            if side.text is not None:
                return dict(json.loads(side.text))
            return dict(read_json(Path(side.source or "")))
    return dict(stored)
