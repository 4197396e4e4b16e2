"""A look at the adapter's own numbers before anything is written: its factors are small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weft.core.blocks import BLOCK
from weft.core.errors import Problem
from weft.deltas import silent as silencing
from weft.execute._blocks import Files, Workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weft.core.specs import Adapter, TensorRef

# All others are as large as weights, and are read in blocks.
_FACTORS = ("A", "B", "magnitude", "bias", "diag", "rows")


def examine(adapter: Adapter, weight: float = 1) -> tuple[list[Problem], list[str]]:
    """What the values of the adapter's factors say: problems that forbid a merge, and warnings."""
    problems: list[Problem] = []
    silent = 0
    shares: list[tuple[int, int]] = []
    files = Files()
    workspace = Workspace()
    nothing: dict[TensorRef, bool] = {}  # whether a tensor is zero all over
    try:
        for entry in adapter.entries:
            for role, ref in entry.tensors:
                if ref in nothing:
                    continue  # what all modules share
                nothing[ref] = False
                # A whole parameter may be a count (of BatchNorm), and indices are; nothing else is.
                floating = getattr(torch, ref.dtype).is_floating_point
                if not floating and role != "value" and not role.startswith("indices"):
                    problems.append(_not_floating(ref))
                    continue
                if role not in _FACTORS:
                    finite, nothing[ref] = _look_at_large(ref, files, workspace)
                    problems += [] if finite else [_not_finite_somewhere(ref)]
                    continue
                values = _values(ref, files, workspace)
                problems += _not_finite(ref, values)
                nothing[ref] = not bool(values.count_nonzero())
                low_rank = entry.kind in ("lora", "dora")
                turned = {"transposed", "factors_transposed"} & dict(entry.params).keys()
                if role == "B" and low_rank and not turned:
                    shares.append((int(values.any(dim=1).count_nonzero()), values.shape[0]))
            roles = silencing(entry.kind)
            zero = any(nothing[ref] for role, ref in entry.tensors if role in roles)
            silent += bool(roles) and (zero or entry.scaling == 0)
    finally:
        files.close()
    if ranks := _sharded(shares):
        problems.append(
            Problem(
                f"{adapter.given} is damaged: each lora_B is zero but for 1/{ranks} of its rows",
                f"one of {ranks} processes saved it without the others' shards: save it again, "
                "gathered (full state dict)",
            )
        )
    why = None
    if weight == 0:
        why = "its weight is 0"
    elif silent and silent == len(adapter.entries):
        why = (
            f"a factor or the scaling is zero in all {silent} modules "
            "(an adapter that was never trained, or a save that lost its weights)"
        )
    return problems, [f"{adapter.given} changes nothing: {why}"] if why else []


def _look_at_large(ref: TensorRef, files: Files, workspace: Workspace) -> tuple[bool, bool]:
    """Whether all of it is finite, and all zero; a new head has no ΔW whose sum would show it."""
    dtype = getattr(torch, ref.dtype)
    if not dtype.is_floating_point:
        return True, False
    finite = zero = True
    for start in range(0, ref.numel, BLOCK["cpu"]):
        stop = min(start + BLOCK["cpu"], ref.numel)
        values = workspace.read(files, ref, start, stop, 1, "in").tensor().float()
        finite = finite and bool(values.isfinite().all())
        zero = zero and not bool(values.any())
        if not finite:
            break
    return finite, zero


def _not_finite_somewhere(ref: TensorRef) -> Problem:
    return Problem(f"{ref.name} in {ref.file} has values that are NaN or infinite")


def _values(ref: TensorRef, files: Files, workspace: Workspace) -> Tensor:
    """The whole of a small tensor, widened (torch cannot count in float8)."""
    dtype = torch.float64 if ref.dtype == "float64" else torch.float32
    found = workspace.read(files, ref, 0, ref.numel, 1, "in")
    return found.tensor().view(ref.shape).to(dtype, copy=True)


def _not_floating(ref: TensorRef) -> Problem:
    return Problem(f"{ref.name} in {ref.file} is {ref.dtype}, not a floating type")


def _not_finite(ref: TensorRef, values: Tensor) -> list[Problem]:
    bad = int((~values.isfinite()).count_nonzero())
    if not bad:
        return []
    return [
        Problem(
            f"{ref.name} in {ref.file} has {bad} of {ref.numel} values NaN or infinite",
            "the training diverged, or the file is damaged: use an earlier checkpoint",
        )
    ]


def _sharded(shares: Sequence[tuple[int, int]]) -> int | None:
    """k, if every lora_B has exactly 1/k of its rows non-zero (those without any aside)."""
    counted = [(used, rows) for used, rows in shares if used]
    for ranks in (2, 4, 8, 16, 32, 64):
        if counted and all(rows >= ranks and used == -(-rows // ranks) for used, rows in counted):
            return ranks
    return None
