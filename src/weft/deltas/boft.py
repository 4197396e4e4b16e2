"""BOFT (arXiv:2311.06243): W′ = s ⊙ (W @ Qᵀ), Q being a product of sparse orthogonal factors.

`R` (factors, blocks, size, size): the skew part of each block, by its Cayley transform, makes a
block-diagonal rotation. Factor i turns not neighbouring inputs, but those that a butterfly of span
2ⁱ · size brings together: Q = … (P₁ R₁ P₁ᵀ) (P₀ R₀ P₀ᵀ), with P₀ = I. `s` scales the outputs, (out)
with an axis of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas import _rotation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = False


@dataclass(frozen=True, slots=True)
class State:
    """For each factor its rotation and, from the second on, where its butterfly brings an input."""

    rotations: list[Tensor]
    orders: list[Tensor]
    scale: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    if len(weight) < 2 or max(shapes["s"]) != weight[0]:
        return ()
    factors, blocks, size, _ = shapes["R"]
    cut = factors == 1 or (size % 2 == 0 and blocks % 2 ** (factors - 1) == 0)
    return (False,) if cut and blocks * size == prod(weight[1:]) else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    R = source.whole("R")
    orders = [_butterfly(n, *R.shape[1:3]).to(R.device) for n in range(1, len(R))]
    rotations = [_rotation.cayley((half - half.mT) * 0.5) for half in R]
    return State(rotations, orders, source.whole("s").reshape(-1, 1))


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    first, *others = state.rotations
    _rotation.rotate(weight, first, out)
    for rotation, order in zip(others, state.orders, strict=True):
        apart, turned = torch.empty_like(out), torch.empty_like(out)
        apart[:, order] = out
        _rotation.rotate(apart, rotation, turned)
        torch.index_select(turned, 1, order, out=out)
    out.mul_(state.scale[start : start + out.shape[0]])


def _butterfly(factor: int, blocks: int, size: int) -> Tensor:
    """In spans of 2 ** `factor` blocks: every other half block first, then those left out."""
    halves = torch.arange(blocks * size).view(blocks >> factor, -1, 2, size // 2)
    return halves.transpose(1, 2).flatten()
