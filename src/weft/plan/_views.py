"""A model as a recipe sees it: a plan that has not been run.

A checkpoint is a plan that copies, `model+adapter` is one that adds deltas, and the outcome of an
earlier document of a recipe is one, too. None of them needs to touch the disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.formats.checkpoint import read_json
from weft.plan._stacks import Stack, stacks
from weft.plan._tied import Tie, find_tie
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.specs import Checkpoint, Plan, TensorJob


@dataclass(frozen=True)
class View:
    """A model that may stand in a recipe.

    Attributes:
        name: As the recipe spells it.
        plan: What its tensors and the files beside them are.
        config: Its `config.json`.
        tie: Which two names one table of the vocabulary has, if it has two.
        tokenizer: The folder with the files of its tokenizer.
        given: What its card credits: the base and the adapters that it is made from.
    """

    name: str
    plan: Plan = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    tie: Tie | None
    tokenizer: Path
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


def outcome(name: str, plan: Plan, donor: View, given: tuple[str, ...]) -> View:
    """The view of what a recipe makes, for the documents after it."""
    config = _config(plan, donor.config)
    tie = None if config_value(config, "tie_word_embeddings") is False else donor.tie
    return View(name, plan, config, tie, donor.tokenizer, given)


def _config(plan: Plan, stored: Mapping[str, Any]) -> dict[str, Any]:
    for side in plan.side_files:
        if side.name == "config.json":
            if side.text is not None:
                return dict(json.loads(side.text))
            return dict(read_json(Path(side.source or "")))
    return dict(stored)
