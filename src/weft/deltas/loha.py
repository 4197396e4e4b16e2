"""LoHa (arXiv:2108.06098): W′ = W + scaling · (w1_a @ w1_b) ⊙ (w2_a @ w2_b).

`w1_a`, `w2_a` (out, r) and `w1_b`, `w2_b` (r, in · kernel). For an effective convolution `t1`, `t2`
(r, r, k…), `w1_a`, `w2_a` (r, out) and `w1_b`, `w2_b` (r, in): each factor is
Σ t[p, q, k…] · w_a[p, out] · w_b[q, in] instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")


@dataclass(frozen=True, slots=True)
class State:
    """The two factors, each `left` (out, r) @ `right` (r, columns)."""

    left: tuple[Tensor, Tensor]
    right: tuple[Tensor, Tensor]
    scaling: float


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    if "t1" in shapes:
        out, inner = shapes["w1_a"][1], shapes["w1_b"][1]
        kernel = prod(shapes["t1"][2:])  # with an axis of 1 behind that of a Conv1d
        one = shapes["t1"] == shapes["t2"]
        return (False,) if one and _flat(weight, 2) == (out, inner, kernel) else ()
    out, columns = shapes["w1_a"][0], shapes["w1_b"][1]
    fits = [False] if _flat(weight, 1) == (out, columns) else []
    return (*fits, *([True] if len(weight) == 2 and weight == (columns, out) else []))


def _flat(weight: Shape, axes: int) -> Shape:
    """The first axes, and all others as one."""
    return (*weight[:axes], prod(weight[axes:])) if weight else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    roles = {role for role, _ in delta.tensors}
    left, right = [], []
    for n in "12":
        a, b = source.whole(f"w{n}_a"), source.whole(f"w{n}_b")
        if f"t{n}" in roles:
            core = source.whole(f"t{n}")
            left.append(a.T.contiguous())
            right.append(torch.einsum("pq...,qi->pi...", core, b).reshape(a.shape[0], -1))
        else:
            left.append(a)
            right.append(b)
    return State((left[0], left[1]), (right[0], right[1]), delta.scaling)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    stop = start + out.shape[0]
    torch.mm(state.left[0][start:stop], state.right[0], out=out)
    out.mul_(torch.mm(state.left[1][start:stop], state.right[1])).mul_(state.scaling)
