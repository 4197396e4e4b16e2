"""GLoRA (arXiv:2306.07967), the bias: b′ = b + b ⊙ D + E + W @ C.

C is a product, `C_left` (in, r) and `C_right` (r, 1), or `C` (in, 1); `D` and `E` are (out) or (1).
`weight` is W, (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.blocks import BLOCK, cut
from weft.core.lazy import torch
from weft.deltas import _paths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True


@dataclass(frozen=True, slots=True)
class State:
    """C is (in, 1); None if it is zero, and W need not be read."""

    source: Source
    C: Tensor | None
    D: _paths.Path
    E: _paths.Path


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    inputs = shapes["weight"][1:]
    fit = len(inputs) == 1 and weight == shapes["weight"][:1]
    fit = fit and _paths.fits(shapes, "C", (*inputs, 1))
    return (False,) if fit and all(_paths.fits(shapes, name, weight) for name in "DE") else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    roles = dict(delta.tensors)
    if "C" in roles:
        C = source.whole("C").view(-1, 1)
    else:
        C = source.whole("C_left") @ source.whole("C_right")
    D, E = (_paths.load(delta, source, name) for name in "DE")
    return State(source, C if C.any() else None, D, E)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    torch.mul(weight, state.D.rows(start, weight), out=out).add_(state.E.rows(start, weight))
    if state.C is None:
        return
    inputs = len(state.C)
    for first, last in cut(0, out.shape[0], inputs, BLOCK[out.device.type]):
        rows = out.new_empty(last - first, inputs)
        state.source.rows("weight", start + first, start + last, rows)
        out[first:last] += rows @ state.C
