"""One function per verb. It wires the layers, returns records, and never prints.

import weft

report = weft.merge("org/base", ["adapter", "other:0.3"], output="merged")
report.totals.survival
weft.run("recipe.yml", output="merged")
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from weft.api._execution import Report, check_place, execute
from weft.core import dtypes, events, units
from weft.core.errors import NotFound, PlanError, Problem, WeftError
from weft.formats import checkpoint as checkpoints
from weft.formats.adapters import describe_adapter, is_adapter, open_adapter
from weft.formats.hub import repository, resolve, sought

__all__ = [
    "Inputs",
    "MergePlan",
    "Report",
    "find_base",
    "inspect",
    "merge",
    "names_adapter",
    "open_inputs",
    "parse_weighted",
    "plan_merge",
]

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.core.specs import Adapter, Checkpoint, Plan
    from weft.plan.preflight import Work


@dataclass(frozen=True, slots=True)
class Inputs:
    """A base and its adapters, opened: headers and configs."""

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What `merge` would do: the plan, its size, and what the adapters' numbers give rise to."""

    inputs: Inputs
    plan: Plan = field(repr=False)
    work: Work
    warnings: tuple[str, ...]


def merge(
    base: str | Path | None,
    adapters: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    expert_layout: str | None = None,
    init_adapter: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    strict: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
    command: str | None = None,
    on_event: events.OnEvent = events.ignore,
) -> Report:
    """Merge adapters into a base model: W + Σ weightᵢ · ΔWᵢ, float32 arithmetic, one rounding.

    Args:
        base: Folder, file or `org/name@revision`; None takes what the first adapter names.
        adapters: Each a folder or hub id, with `:0.7` behind it for a weight other than 1.
        output: Folder to create.
        dtype: `bfloat16`, `float16` or `float32`; None keeps each tensor's own.
        max_shard_size: Such as `5GB`; None keeps the base's shards.
        expert_layout: `rank_major` or `grouped_by_expert`, how `lora_B` of fused experts is laid
            out; None goes by the adapter's config, which without a word means `rank_major`.
        init_adapter: The adapter as it was before training, where PiSSA, OLoRA, CorDA or LoRA-GA
            moved the base; `none` says that `base` is what they, or LoftQ, left.
        threads: None takes what affinity and cgroup allow.
        device: `cpu`, `cuda` or `cuda:1`, where the arithmetic is done.
        force: Replace an output that is there already.
        resume: Finish an interrupted run.
        strict: Refuse adapters whose keys need repair, in place of reading them as they were meant.
        revision: Of the base on the hub.
        cache_dir: The hub's cache, in place of HF_HOME's.
        command: What the card and the manifest quote; None writes the Python call.
        on_event: Called with progress, from several threads.

    Raises:
        WeftError: See `weft.core.errors`; the output is not there, and `resume` may finish it.
    """
    from weft.write.card import card

    begin = time.perf_counter()
    count = check_place(device, threads)
    draft = _draft(
        base,
        adapters,
        dtype=dtype,
        max_shard_size=max_shard_size,
        expert_layout=expert_layout,
        init_adapter=init_adapter,
        strict=strict,
        revision=revision,
        cache_dir=cache_dir,
    )
    inputs, plan = draft.inputs, draft.plan
    if plan is None or draft.problems:
        _examine(draft)  # adds its own, and raises them all
    assert plan is not None
    command = command or _call(
        inputs, output, dtype, max_shard_size, expert_layout, init_adapter, revision
    )
    weft = version("weft")
    if base is None:
        named = f"{inputs.base.given} is the base, as {inputs.adapters[0][0].given} names it"
        on_event(events.Noted(named))
    return execute(
        plan,
        Path(output),
        operation="merge",
        command=command,
        card=lambda sums: card(inputs.base, inputs.adapters, sums, command=command, version=weft),
        examine=lambda: _examine(draft),
        begin=begin,
        threads=count,
        device=device,
        force=force,
        resume=resume,
        on_event=on_event,
    )


def plan_merge(
    base: str | Path | None,
    adapters: str | Path | Sequence[str | Path],
    *,
    output: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    expert_layout: str | None = None,
    init_adapter: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    strict: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> MergePlan:
    """What `merge` would do with these arguments; reads headers, configs and the adapters' factors.

    Raises:
        WeftError: What `merge` would stop at before it writes.
    """
    from weft.plan.preflight import measure
    from weft.write.checkpoint import check_output

    threads = check_place(device, threads)
    draft = _draft(
        base,
        adapters,
        dtype=dtype,
        max_shard_size=max_shard_size,
        expert_layout=expert_layout,
        init_adapter=init_adapter,
        strict=strict,
        revision=revision,
        cache_dir=cache_dir,
    )
    found, made = _examine(draft), draft.plan
    assert made is not None
    if output is not None:
        check_output(Path(output), made, force=force, resume=resume)
    return MergePlan(draft.inputs, made, measure(made, threads), (*found, *made.warnings))


@dataclass(frozen=True, slots=True)
class _Draft:
    """A plan from headers and configs: the adapters' numbers have not been looked at.

    Attributes:
        inputs: The base and its adapters.
        initial: The adapter as it was before training.
        plan: None if there are problems that leave none.
        problems: What forbids the merge.
    """

    inputs: Inputs
    initial: Adapter | None
    plan: Plan | None
    problems: tuple[Problem, ...]


def _draft(
    base: str | Path | None,
    adapters: str | Path | Sequence[str | Path],
    *,
    dtype: str | None,
    max_shard_size: str | int | None,
    expert_layout: str | None,
    init_adapter: str | Path | None,
    strict: bool,
    revision: str | None,
    cache_dir: str | None,
) -> _Draft:
    """All of a plan that takes no torch, which is slow to load."""
    from weft.plan.merge import plan_merge as plan

    if expert_layout not in (None, "rank_major", "grouped_by_expert"):
        raise WeftError(
            f"unknown expert layout {expert_layout!r}", "one of rank_major, grouped_by_expert"
        )
    kind = dtypes.parse(dtype) if dtype else None
    size = None if max_shard_size is None else units.parse_size(str(max_shard_size))
    inputs = open_inputs(base, adapters, revision=revision, cache_dir=cache_dir)
    initial = None
    if init_adapter is not None and str(init_adapter) != "none":
        path = resolve(str(init_adapter), cache_dir=cache_dir)
        initial = open_adapter(path, str(init_adapter))
    problems: list[Problem] = []
    made: Plan | None = None
    try:
        made = plan(
            inputs.base,
            inputs.adapters,
            dtype=kind,
            max_shard_size=size,
            expert_layout=expert_layout,
            initial=initial,
            base_is_residual=str(init_adapter) == "none",
        )
    except PlanError as error:
        problems += error.problems
    if strict and made is not None:
        hint = "without --strict it is read so; weft doctor --fix writes it so"
        problems += [Problem(f"{repair}", hint) for repair in made.repairs]
    return _Draft(inputs, initial, made, tuple(problems))


def _examine(draft: _Draft) -> list[str]:
    """Warnings that the adapters' numbers give rise to.

    Raises:
        PlanError: They, or the draft, have problems: all of them.
    """
    from weft.execute.health import examine

    problems: list[Problem] = []
    warnings: list[str] = []
    if draft.initial is not None:
        problems, zero = examine(draft.initial)
        if zero:
            what = f"{draft.initial.given} is zero, so no initialisation that moves the base wrote "
            problems.append(
                Problem(
                    f"{what}it: {zero[0]}", "save the adapter before the first step of the training"
                )
            )
    for adapter, weight in draft.inputs.adapters:
        found, said = examine(adapter, weight)
        problems += found
        warnings += said
    problems += draft.problems
    if problems or draft.plan is None:
        named = [draft.inputs.base.given, *(a.given for a, _ in draft.inputs.adapters)]
        raise PlanError(" + ".join(named), problems)
    return warnings


def open_inputs(
    base: str | Path | None,
    adapters: str | Path | Sequence[str | Path],
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> Inputs:
    """Find and open a base and its adapters; the problems of all adapters are reported at once."""
    listed = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if not listed:
        raise WeftError("no adapter given", "weft merge BASE ADAPTER -o OUT")
    opened: list[tuple[Adapter, float]] = []
    problems: list[Problem] = []
    for text in listed:
        given, weight = parse_weighted(str(text))
        try:
            opened.append((open_adapter(resolve(given, cache_dir=cache_dir), given), weight))
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(", ".join(str(text) for text in listed), problems)
    if base is not None:
        given = str(base)
        folder = resolve(given, revision=revision, cache_dir=cache_dir)
    else:
        given = _named_base(opened)
        cure = "give the base first: weft merge BASE ADAPTER -o OUT"
        folder = find_base(opened[0][0], cure, revision=revision, cache_dir=cache_dir)
    return Inputs(checkpoints.open_checkpoint(folder, given), tuple(opened))


def find_base(
    adapter: Adapter, cure: str, *, revision: str | None = None, cache_dir: str | None = None
) -> Path:
    """The base that an adapter names, as a local file or folder.

    Raises:
        NotFound: It is not there: which file names it, where it was looked for, and `cure`.
    """
    named = adapter.base_model or ""
    try:
        return resolve(named, revision=revision or adapter.revision, cache_dir=cache_dir)
    except WeftError as error:
        hub = repository(named) is not None and error.hint
        raise NotFound(
            f"{adapter.given} is an adapter, and {adapter.sources[-1].path} names its base "
            f"{named}: {sought(error, named)}",
            f"{cure}\n{error.hint}" if hub else cure,
        ) from None


def parse_weighted(text: str) -> tuple[str, float]:
    """`adapter:0.7` -> (`adapter`, 0.7); without a weight it is 1."""
    given, colon, number = text.rpartition(":")
    try:
        weight = float(number)
        if not colon or Path(text).exists():  # a folder may be called `run:7`
            return text, 1.0
    except OSError:
        return text, 1.0
    except ValueError:
        if given and Path(given).is_dir() and not Path(text).exists():
            raise WeftError(
                f"the weight of {given} is {number!r}, not a number", f"write {given}:0.7"
            ) from None
        return text, 1.0
    if not math.isfinite(weight):
        raise WeftError(f"the weight of {given} is {number}", "give a finite number, such as 0.7")
    return given, weight


def names_adapter(
    text: str | Path, *, revision: str | None = None, cache_dir: str | None = None
) -> bool:
    """Whether `text` is an adapter and not a base model: for a command that leaves the base out."""
    path = resolve(parse_weighted(str(text))[0], revision=revision, cache_dir=cache_dir)
    return is_adapter(path) and not checkpoints.has_weights(path)


def inspect(
    path: str | Path, *, revision: str | None = None, cache_dir: str | None = None
) -> Checkpoint | Adapter:
    """What a file or folder is: a base model or an adapter, from its headers and configs.

    Of a model that weft wrote, `origin` says from what, if its manifest is of these tensors; of an
    adapter that cannot be merged, `obstacles` say why.

    Raises:
        WeftError: Neither, or malformed.
    """
    folder = resolve(str(path), revision=revision, cache_dir=cache_dir)
    if is_adapter(folder) and not checkpoints.has_weights(folder):
        return describe_adapter(folder, str(path))
    from weft.write.manifest import origin

    found = checkpoints.open_checkpoint(folder, str(path))
    return replace(found, origin=origin(found))


def _named_base(adapters: Sequence[tuple[Adapter, float]]) -> str:
    names = {adapter.base_model for adapter, _ in adapters}
    name = adapters[0][0].base_model
    if name is None:
        raise WeftError(
            f"{adapters[0][0].given} does not say which base model it belongs to",
            "give the base first: weft merge BASE ADAPTER -o OUT",
        )
    if len(names) > 1:
        raise WeftError(
            f"the adapters name different base models: {', '.join(str(n) for n in names)}",
            "give the base first: weft merge BASE ADAPTER ADAPTER -o OUT",
        )
    return name


def _call(inputs: Inputs, output: str | Path, *options: str | int | Path | None) -> str:
    adapters = [
        a.given if weight == 1 else f"{a.given}:{weight:g}" for a, weight in inputs.adapters
    ]
    names = ("dtype", "max_shard_size", "expert_layout", "init_adapter", "revision")
    given = zip(names, options, strict=True)
    extra = "".join(f", {name}={_plain(value)!r}" for name, value in given if value is not None)
    return f"weft.merge({inputs.base.given!r}, {adapters!r}, output={str(output)!r}{extra})"


def _plain(value: str | int | Path | None) -> str | int | None:
    return str(value) if isinstance(value, Path) else value
