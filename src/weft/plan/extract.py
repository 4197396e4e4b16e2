"""Two models -> what an adapter that leads from one to the other would hold, if it all changed.

Which tensors did change shows only when they are read.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weft.core.dtypes import OUTPUTS, WEIGHTS
from weft.core.errors import PlanError, Problem
from weft.core.filters import Filter, any_of
from weft.core.names import match, nearest
from weft.core.specs import Expression, Input, Load, Merge, Plan, Shape, TensorJob, job_bytes
from weft.formats.checkpoint import same_bytes
from weft.plan._adapter_form import with_one_rank
from weft.plan._computed import is_computed
from weft.plan._extract_forms import Form, Forms
from weft.plan._moe import FUSED, ONE_EXPERT
from weft.plan.float8 import in_compute_dtype
from weft.plan.preflight import dominant_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.wishes import Wishes
    from weft.plan._views import View


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a tensor, if it changed.

    Attributes:
        job: tuned − base of it; where `fresh`, the tuned one itself.
        path: The parameter in the model that transformers makes.
        action: `decompose`, `save` it in full, or `leave` it as it is in the base.
        form: How LoRA takes it.
        why: Why it is not decomposed.
        rank: Asked for it by name.
        head: The path of the output embedding that is the same tensor.
        fresh: The base has none, or one of another size.
        either: To be saved in full, if that is smaller than its factors.
        parts: What the files have in its place: the experts of a layer, one by one, in the order
            of the fused tensor's rows.
    """

    job: TensorJob
    path: str
    action: str
    form: Form
    why: str = ""
    rank: int | None = None
    head: str | None = None
    fresh: bool = False
    either: bool = False
    parts: tuple[TensorJob, ...] = field(default=(), repr=False)

    @property
    def jobs(self) -> tuple[TensorJob, ...]:
        """What is read for it."""
        return self.parts or (self.job,)

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def module(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def is_read(self) -> bool:
        """It may have changed."""
        return self.fresh or isinstance(self.job.expression, Merge)


@dataclass(frozen=True)
class ExtractPlan:
    """Everything that an extraction may do; made from headers and configs alone.

    Attributes:
        changes: One for each tensor of the two models, in the base's order.
        reads: The same as a plan: what is read, and its hash.
        wishes: What was asked for, its dtype decided.
        paths: Every parameter of the base, as transformers calls it.
        config: Of the base.
        base_model: Its name, and its revision.
        tokenizer: Files of the tuned model's, where the vocabulary grew.
        notes, warnings: What the user should know.
    """

    changes: tuple[Change, ...] = field(repr=False)
    reads: Plan = field(repr=False)
    wishes: Wishes
    paths: tuple[str, ...] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    base_model: str
    revision: str | None
    tokenizer: tuple[tuple[str, str], ...] = field(repr=False)
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def dtype(self) -> str:
        """Of the factors."""
        assert self.wishes.dtype
        return self.wishes.dtype


def plan_extract(tuned: View, base: View, wishes: Wishes, revision: str | None) -> ExtractPlan:
    """Say what becomes of every tensor.

    Raises:
        PlanError: The models do not fit each other, or the filters them; every reason found.
    """
    tuned, base = in_compute_dtype(tuned), in_compute_dtype(base)
    draft = _Draft(tuned, base, wishes)
    # Of what is added to a model its plan says much; alone, how its numbers were read.
    alone = [note for each in (tuned, base) if len(each.given) == 1 for note in each.plan.notes]
    draft.notes += dict.fromkeys(alone)
    changes = draft.changes()
    draft.check_filters(changes)
    changes, said = with_one_rank(gathered(changes), wishes.rule)
    draft.warnings += said
    if draft.problems:
        raise PlanError(f"{tuned.name} − {base.name}", draft.problems)
    own = dominant_dtype((job.dtype, job_bytes(job)) for job in base.tensors.values())
    wishes = replace(wishes, dtype=wishes.dtype or (own if own in OUTPUTS else "float32"))
    if any(change.head and change.action == "decompose" for change in changes):
        draft.warnings.append(
            "the tied embedding is written as factors for both of its ends, as PEFT loads it; but "
            "PEFT's merge_and_unload (0.21) adds both to the one tensor: merge it with weft"
        )
    if any(change.name in draft.split and change.action == "decompose" for change in changes):
        draft.warnings.append(
            f"{base.name} ties its embeddings and {tuned.name} does not: PEFT's merge_and_unload "
            "(0.21) adds the factors of each end to the one tensor: merge it with weft"
        )
    grown = any(change.fresh and change.form.kind == "embedding" for change in changes)
    files = _tokenizer(tuned) if grown else {}
    if len(base.given) > 1:
        draft.warnings.append(
            f"the adapter belongs to {' + '.join(base.given)} and not to {base.given[0]} alone, "
            "which its config has to name: merge the base first if others are to use it"
        )
    # What is left as it is, is read all the same: to say what of it changed.
    jobs = tuple(job for change in changes if change.is_read for job in change.jobs)
    return ExtractPlan(
        changes=tuple(changes),
        reads=Plan(
            jobs=jobs,
            metadata=(("extract", repr(wishes)),),
            side_files=(),
            inputs=tuple(_inputs(tuned, base)),
            notes=(),
            warnings=(),
        ),
        wishes=wishes,
        paths=tuple(draft.forms.path(name) for name in base.tensors),
        config=base.config,
        base_model=base.given[0].partition("@")[0],
        revision=revision,
        tokenizer=tuple(sorted(files.items())),
        notes=tuple(draft.notes),
        warnings=tuple(draft.warnings),
    )


class _Draft:
    """What is known so far."""

    def __init__(self, tuned: View, base: View, wishes: Wishes) -> None:
        self.tuned, self.base, self.wishes = tuned, base, wishes
        self.forms = Forms(base)
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []
        # One table for both ends in both models: one change.
        self.tied = base.tie is not None and tuned.tie is not None
        # The ends of a table that is one tensor in the base alone.
        self.split = {base.tie.embedding, base.tie.head} if base.tie and not self.tied else set()

    def changes(self) -> list[Change]:
        """In the base's order; what only the tuned model has follows."""
        wanted = list(self.base.tensors)
        head = self.base.tie.head if self.base.tie else None
        if head and not self.tied:
            wanted.append(head)
            self.notes.append(
                f"{self.base.name} ties its embeddings and {self.tuned.name} does not: each gets "
                "its own part of the adapter"
            )
        ours, theirs = (
            {each.path: each.count for each in v.stacks} for v in (self.tuned, self.base)
        )
        deeper = [path for path, count in ours.items() if count > theirs.get(path, count)]
        self.problems += [
            Problem(
                f"{path} has {ours[path]} layers in {self.tuned.name}, and {theirs[path]} in "
                f"{self.base.name}",
                "an adapter changes layers and adds none: is this the model that TUNED came from?",
            )
            for path in deeper
        ]
        found = match(wanted, self.tuned.tensors).names
        if self.tuned.tie and not self.tied:
            found[self.tuned.tie.head] = self.tuned.tie.head
        changes = []
        for name in wanted:
            base = self.base.tensor(name)
            tuned = self.tuned.tensor(found[name]) if name in found else None
            assert base is not None
            if tuned is None and is_computed(name):
                self.notes.append(f"{name} is computed by the model, and left out")
            elif tuned is None:
                self._missing(name)
            else:
                changes.append(self._change(name, tuned, base))
        new = {n for n in set(self.tuned.tensors) - set(found.values()) if not is_computed(n)}
        new = {name for name in new if not any(name.startswith(f"{path}.") for path in deeper)}
        changes += [self._fresh(name, self.tuned.tensors[name]) for name in sorted(new)]
        return changes

    def _missing(self, name: str) -> None:
        near = nearest(name, self.tuned.tensors, 1)
        close = f"; nearest: {near[0]}" if near else ""
        self.problems.append(
            Problem(
                f"{self.tuned.name} has no {name}, which {self.base.name} has{close}",
                "are the two of one architecture, and saved by one release of transformers?",
            )
        )

    def _fresh(self, name: str, tuned: TensorJob) -> Change:
        self.notes.append(f"{name} is new: {self.base.name} has none")
        form = Form("none", why="the base has none")
        return self._decided(Change(tuned, self.forms.path(name), "save", form, fresh=True))

    def _change(self, name: str, tuned: TensorJob, base: TensorJob) -> Change:
        form = self.forms.form(name, base.shape, base.dtype)
        path = self.forms.path(name)
        tie = self.base.tie
        head = tie.head if tie and self.tied and name == tie.embedding else None
        if tuned.shape != base.shape:
            if not self._grows(name, tuned.shape, base.shape):
                self.problems.append(
                    Problem(
                        f"{name} is {list(tuned.shape)} in {self.tuned.name} and "
                        f"{list(base.shape)} in {self.base.name}",
                        "an adapter changes weights, not their shapes: is this the model that "
                        "TUNED was tuned from?",
                    )
                )
            job = TensorJob(name, tuned.dtype, tuned.shape, "", tuned.expression)
            why = f"the vocabulary went from {base.shape[0]} to {tuned.shape[0]} rows"
            form = replace(form, kind=form.kind if form.kind == "embedding" else "none")
            return self._decided(Change(job, path, "save", form, why, head=head, fresh=True))
        if base.dtype not in WEIGHTS or tuned.dtype not in WEIGHTS:
            one, other = tuned.expression, base.expression
            job = TensorJob(name, tuned.dtype, tuned.shape, "", one)
            loads = isinstance(one, Load) and isinstance(other, Load)
            same = one == other or (loads and same_bytes(one.ref, other.ref))  # type: ignore[union-attr]
            action = "leave" if same else "save"
            return self._decided(Change(job, path, action, form, form.why, fresh=not same))
        difference = Merge("task_arithmetic", base.expression, (tuned.expression,))
        job = TensorJob(name, tuned.dtype, tuned.shape, "", difference)
        return self._decided(Change(job, path, "decompose", form, head=head))

    def _grows(self, name: str, tuned: Shape, base: Shape) -> bool:
        return self.forms.is_table(name, base) and tuned[1:] == base[1:]

    def _decided(self, change: Change) -> Change:
        """With the action that form and wishes make of it."""
        wishes, name, form = self.wishes, change.path, change.form
        table = form.kind == "embedding" or self.forms.is_table(change.name, change.job.shape)
        if found := any_of(wishes.exclude, name):
            return replace(change, action="leave", why=f"--exclude {found.text}")
        if table and wishes.embed == "skip":
            return replace(change, action="leave", why="--embed skip")
        action, why, either = change.action, change.why, False
        saved = any_of(wishes.save, name)
        if action == "decompose" and saved:
            action, why = "save", f"--save {saved.text}"
        elif action == "decompose" and table and wishes.embed == "save":
            action, why = "save", "--embed save"
        elif action == "decompose" and form.kind == "none":
            action, why = "save", form.why
        elif action == "decompose" and change.head and self.forms.conv1d:
            action, why = "save", "PEFT has one fan_in_fan_out, for Conv1D and the tied head"
        elif action == "decompose" and change.head and wishes.embed is None:
            action, why = (
                "save",
                "PEFT's merge would add ΔW of a tied table twice",
            )
        elif action == "decompose" and change.name in self.split and wishes.embed is None:
            action, why = "save", "the base ties it, and PEFT's merge would change both ends"
        elif action == "decompose" and table:
            either = wishes.embed is None and not wishes.uniform
        if wishes.target is not None and not saved and not any_of(wishes.target, name):
            return replace(change, action="leave", why="--target does not name it")
        if action == "save" and wishes.uniform:
            return replace(change, action="leave", why=f"--uniform-rank, and {why}")
        rank = next((rank for each, rank in wishes.ranks if each.matches(name)), None)
        return replace(change, action=action, why=why, rank=rank, either=either)

    def check_filters(self, changes: list[Change]) -> None:
        """Every filter names something."""
        paths = [change.path for change in changes]
        parts = {part for path in paths for part in path.split(".") if not part.isdigit()}
        wishes = self.wishes
        given: list[tuple[str, Filter]] = [
            *(("--target", each) for each in wishes.target or ()),
            *(("--save", each) for each in wishes.save),
            *(("--exclude", each) for each in wishes.exclude),
            *(("--rank", each) for each, _ in wishes.ranks),
        ]
        for option, each in given:
            if not any(each.matches(path) for path in paths) and each.text != "lm_head":
                near = nearest(each.text, parts, 1)
                meant = f", did you mean {near[0]!r}?" if near else ""
                self.problems.append(
                    Problem(
                        f"{option} {each.text!r} names nothing in {self.base.name}{meant}",
                        "a filter is a part of a name, a glob (*norm*) or a /regex/",
                    )
                )


def _tokenizer(tuned: View) -> dict[str, str]:
    from weft.formats.side_files import part_of

    return {
        side.name: side.source
        for side in tuned.plan.side_files
        if side.source and part_of(side.name)
    }


def _inputs(tuned: View, base: View) -> list[Input]:
    found = {entry.path: entry for entry in base.plan.inputs}
    for entry in tuned.plan.inputs:
        found.setdefault(entry.path, replace(entry, role=f"tuned {entry.role}"))
    return list(found.values())


def gathered(changes: list[Change]) -> list[Change]:
    """With the experts of a layer as the tensors that transformers makes of them.

    PEFT adapts those, in memory; files have them one by one. What is not complete stays apart.
    """
    groups: dict[tuple[str, str], dict[tuple[int, int], Change]] = defaultdict(dict)
    for change in changes:
        found = ONE_EXPERT.match(change.module)
        if found and change.action == "decompose" and change.form.kind == "linear":
            fused, part = FUSED[found[3]]
            groups[found[1], fused][int(found[2]), part] = change
    made: dict[str, Change] = {}
    taken: set[str] = set()
    for (module, fused), parts in groups.items():
        if new := _fused(module, fused, parts):
            made[next(iter(parts.values())).name] = new
            taken |= {change.name for change in parts.values()}
    kept = (made.get(change.name, change) for change in changes)
    return [change for change in kept if change.name not in taken]


def _fused(module: str, parameter: str, parts: Mapping[tuple[int, int], Change]) -> Change | None:
    """One parameter of all experts; None if some are missing, or differ."""
    count = 1 + max(expert for expert, _ in parts)
    each = 1 + max(part for _, part in parts)
    changes = [parts.get((e, n)) for e in range(count) for n in range(each)]
    first = changes[0]
    shapes = {change.job.shape for change in changes if change}
    ranks = {change.rank for change in changes if change}
    if None in changes or first is None or len(shapes) > 1 or len(ranks) > 1:
        return None
    rows, columns = first.job.shape
    shape = (count, each * rows, columns)
    jobs = tuple(change.job for change in changes if change)
    name = f"{module}.{parameter}"
    job = TensorJob(name, first.job.dtype, shape, "", first.job.expression)
    return Change(job, name, "decompose", Form("experts", *shape), rank=first.rank, parts=jobs)


def tuned_of(change: Change) -> Expression:
    """The tensor of the tuned model."""
    expression = change.job.expression
    if change.fresh or not isinstance(expression, Merge):
        return expression
    return expression.inputs[0]


def stored_as(change: Change) -> str | None:
    """The dtype that the tuned tensor was rounded to, if it lies on a disk."""
    expression = tuned_of(change)
    return expression.ref.dtype if isinstance(expression, Load) else None
