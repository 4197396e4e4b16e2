"""Base + adapters -> Plan: W + Σ weightᵢ · ΔWᵢ for every tensor that some adapter changes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from weft.core.dtypes import WEIGHTS
from weft.core.errors import PlanError, Problem
from weft.core.specs import (
    Adapter,
    AddDeltas,
    Checkpoint,
    Expression,
    Input,
    Load,
    Plan,
    SideFile,
    TensorJob,
    TensorRef,
    job_bytes,
)
from weft.formats.checkpoint import describe_copied, describe_input
from weft.plan._experts import localise
from weft.plan._initial import with_initial
from weft.plan._layouts import doubtful_copy, fitted
from weft.plan._named_base import other_base
from weft.plan._replicated import replicated
from weft.plan._side_files import side_files
from weft.plan._targets import Change, Targets, collect
from weft.plan._tied import find_tie, resolve, untold
from weft.plan.preflight import config_value, dominant_dtype, quantised

if TYPE_CHECKING:
    from collections.abc import Sequence


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    expert_layout: str | None = None,
    initial: Adapter | None = None,
    base_is_residual: bool = False,
) -> Plan:
    """Say what every output tensor is.

    Args:
        base: The base model.
        adapters: Each with the weight that multiplies its whole update.
        dtype: Of every floating tensor of the output; None keeps each tensor's own.
        max_shard_size: Bytes per shard; None keeps the base's shards.
        expert_layout: How `lora_B` of fused experts is laid out, `rank_major` or
            `grouped_by_expert`; None goes by each adapter's config.
        initial: What the adapters were before training, if their initialisation moved the base.
        base_is_residual: The base is what such an initialisation left.

    Raises:
        PlanError: The adapters do not fit the base; every reason found.
    """
    subject = " + ".join([base.given, *(adapter.given for adapter, _ in adapters)])
    if problems := quantised(base):
        raise PlanError(subject, problems)
    stored = base.config
    base, problems, deeper = replicated(base, adapters)
    adapters, found = with_initial(adapters, initial, base_is_residual=base_is_residual)
    problems += found
    adapters, found = _localised(base, adapters, expert_layout)
    problems += found
    tie = find_tie(base, adapters)
    targets = collect(base, adapters, tie.head if tie else None, tie.embedding if tie else None)
    untied = tie is not None and resolve(tie, targets, base, adapters)
    if tie is None:
        targets.problems += untold(base, targets)
    rows = _new_rows(base, targets)
    targets.problems += problems
    targets.notes += deeper
    if targets.problems:
        raise PlanError(subject, targets.problems)
    # What was not tied before must not become so by a default of the model's class.
    untied = untied or (tie is None and _changes_an_end(base, targets))
    jobs = _jobs(base, targets, dtype, tie.embedding if tie else None)
    jobs = reshard(jobs, max_shard_size) if max_shard_size else jobs
    written = dominant_dtype((job.dtype, job_bytes(job)) for job in jobs)
    files, beside = side_files(
        base,
        adapters,
        dtype=written,
        cast=dtype is not None,
        rows=rows,
        untied=untied,
        stored=stored,
    )
    notes, warnings = _said(base, adapters, targets)
    repairs = (*(r for a, weight in adapters if weight for r in a.repairs), *targets.repairs)
    return Plan(
        jobs=tuple(jobs),
        metadata=tuple(sorted({**base.metadata, "format": "pt"}.items())),
        side_files=tuple(files),
        inputs=tuple(_inputs(base, adapters, files)),
        notes=(*(f"repaired: {repair}" for repair in repairs), *notes),
        warnings=tuple(warnings),
        repairs=repairs,
        beside=tuple(beside),
    )


def _localised(
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], layout: str | None
) -> tuple[list[tuple[Adapter, float]], list[Problem]]:
    """The adapters, in the layout that the base has, experts in particular."""
    found = []
    problems: list[Problem] = []
    for given, weight in adapters:
        adapter, wrong = fitted(base, given)
        problems += wrong
        adapter, wrong = localise(base, adapter, layout)
        problems += wrong
        found.append((adapter, weight))
    kinds = {entry.kind for adapter, _ in found for entry in adapter.entries}
    if layout and not kinds & {"lora_experts", "lora_expert"}:
        what = "--expert-layout is given, and no adapter is one of fused experts"
        problems.append(Problem(what, "leave it out"))
    return found, problems


def _said(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    targets: Targets,
) -> tuple[list[str], list[str]]:
    """Notes and warnings on how the two were brought together."""
    named = [other_base(base, adapter) for adapter, weight in adapters if weight]
    notes = [
        *targets.notes,
        *(note for _, found in named for note in found),
        *(note for adapter, _ in adapters for note in adapter.notes),
    ]
    warnings = [
        *(warning for found, _ in named for warning in found),
        *targets.warnings,
        *(said for adapter, weight in adapters if weight for said in doubtful_copy(base, adapter)),
        *_replaced_twice(targets),
        *_without_config(base),
    ]
    return notes, warnings


def _without_config(base: Checkpoint) -> list[str]:
    if "config.json" in base.side_files:
        return []
    warning = (
        f"{base.given} has no config.json, and so the output has none: transformers cannot load "
        "it, and if its embeddings are tied is unknown; put the model's config.json beside the "
        "weights and merge again"
    )
    return [warning]


def _inputs(
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], files: Sequence[SideFile]
) -> list[Input]:
    """Every file that is read for the output, or copied into it."""
    found = [describe_input("base", source) for source in base.sources]
    for number, (adapter, _) in enumerate(adapters, 1):
        found += [describe_input(f"adapter {number}", source) for source in adapter.sources]
    known = {entry.path for entry in found}
    owners = {a.folder: f"adapter {n}" for n, (a, _) in reversed([*enumerate(adapters, 1)])}
    for side in files:
        if side.source is not None and side.source not in known:
            role = owners.get(side.source.removesuffix(f"/{side.name}"), "base")
            found.append(describe_copied(role, Path(side.source)))
    return found


def _changes_an_end(base: Checkpoint, targets: Targets) -> bool:
    """One of two vocabulary tables changes, and the config leaves open if they are tied."""
    if config_value(base.config, "tie_word_embeddings") is not None:
        return False
    vocabulary = config_value(base.config, "vocab_size")
    shapes = {name: ref.shape for name, ref in base.tensors.items()}
    tables = [n for n, shape in shapes.items() if len(shape) == 2 and shape[0] == vocabulary]
    return len(tables) == 2 and any(name in targets.changes for name in tables)


def _new_rows(base: Checkpoint, targets: Targets) -> int | None:
    """The new size of the vocabulary, which all tensors with a row per token must share."""
    sizes: dict[str, int] = {}
    vocabulary = config_value(base.config, "vocab_size")
    for name, ref in base.tensors.items():
        change = targets.changes.get(name)
        shape = change.base.shape if change and change.base else ref.shape
        if ref.shape and (
            shape != ref.shape or (ref.shape[0] == vocabulary and len(ref.shape) == 2)
        ):
            sizes[name] = shape[0]
    grown = {n: rows for n, rows in sizes.items() if rows != base.tensors[n].shape[0]}
    if grown and len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {rows}" for name, rows in sizes.items())
        targets.problems.append(
            Problem(
                f"the adapter resizes the vocabulary of some tensors and not of all: {found}",
                "PEFT leaves the other's new rows out of the file: train with both embeddings in "
                "target_modules or modules_to_save",
            )
        )
    return next(iter(grown.values()), None)


def _replaced_twice(targets: Targets) -> list[str]:
    return [
        f"{name} is replaced by more than one adapter; written is W + Σ weight · (value − W)"
        for name, change in targets.changes.items()
        if sum(delta.kind in ("replace", "trainable_tokens") for _, delta in change.deltas) > 1
    ]


# ------------------------------------------------------------------------------------------- jobs


def _jobs(
    base: Checkpoint, targets: Targets, dtype: str | None, embedding: str | None
) -> list[TensorJob]:
    """One job per output tensor, in the base's order; new ones follow in the last shard."""
    common = dominant_dtype((ref.dtype, ref.nbytes) for ref in base.tensors.values())
    jobs = []
    for name, ref in base.tensors.items():
        change = targets.changes.pop(name, Change())
        shard = _output_name(Path(ref.file).name)
        jobs.append(_job(name, ref, ref.dtype, shard, change, dtype))
    last = jobs[-1].shard
    for name, change in targets.changes.items():
        # Only the head of a tied model can be changed without being there.
        ref = base.tensors[embedding or ""]
        jobs.append(_job(name, ref, ref.dtype, last, change, dtype))
    for name, ref in targets.added.items():
        own = common if ref.dtype in WEIGHTS and common else ref.dtype
        jobs.append(_job(name, ref, own, last, Change(), dtype))
    return jobs


def _job(
    name: str, ref: TensorRef, own_dtype: str, shard: str, change: Change, dtype: str | None
) -> TensorJob:
    first = change.base or ref
    deltas = [delta for _, delta in change.deltas]
    # A replacement with more on top of it: what is on top belongs to the value, not to W.
    full = [d for d in deltas if d.kind == "replace"]
    if len(full) == 1 and len(deltas) > 1 and full[0].weight == 1 and _one_owner(change):
        deltas.remove(full[0])
        first = full[0].tensors[0][1]
    expression: Expression = Load(first)
    if deltas:
        expression = AddDeltas(expression, tuple(deltas))
    out = dtype if dtype and own_dtype in WEIGHTS else own_dtype
    return TensorJob(name, out, first.shape, shard, expression)


def _one_owner(change: Change) -> bool:
    return len({owner for owner, _ in change.deltas}) == 1


def _output_name(name: str) -> str:
    """A shard's name in the output: the base's, in the safetensors spelling."""
    stem, _, suffix = name.rpartition(".")
    if suffix == "safetensors":
        return name
    return re.sub(r"^pytorch_model", "model", stem) + ".safetensors"


def reshard(jobs: Sequence[TensorJob], limit: int) -> list[TensorJob]:
    """Fill shards of at most `limit` bytes in order; a larger tensor gets one of its own."""
    shards: list[list[TensorJob]] = [[]]
    size = 0
    for job in jobs:
        if shards[-1] and size + job_bytes(job) > limit:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job_bytes(job)
    count = len(shards)
    width = max(5, math.floor(math.log10(count)) + 1)
    names = [f"model-{n:0{width}}-of-{count:0{width}}.safetensors" for n in range(1, count + 1)]
    names = ["model.safetensors"] if count == 1 else names
    return [
        replace(job, shard=name) for name, shard in zip(names, shards, strict=True) for job in shard
    ]
