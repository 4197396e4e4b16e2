"""OFT as PEFT had it up to 0.13 (arXiv:2306.07280): W′ = Dᵀ @ W, D block-diagonal over the outputs.

`R` (blocks, size, size), or (1, size, size) for all blocks if they share it: a block of D is
(I − S)(I + S)⁻¹ with the skew part S = (R − Rᵀ) / 2. Where the outputs are no multiple of `size`,
D ends with them. With `eps` > 0 (COFT) an R of norm above eps · size² / √blocks is scaled down to
that first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    """The blocks of D, (blocks, size, size)."""

    rotation: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    blocks = params["blocks"]
    assert isinstance(blocks, int)
    if len(weight) not in (2, 4) or shapes["R"][0] not in (1, blocks):
        return ()
    return (False,) if shapes["R"][1] == math.ceil(weight[0] / blocks) else ()


def together(shape: Shape, params: Mapping[str, Param]) -> int:
    """A block's rows; all of them where the last block is cut."""
    blocks = params["blocks"]
    assert isinstance(blocks, int)
    return 0 if shape[0] % blocks else shape[0] // blocks


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    R = source.whole("R")
    if eps := float(delta.param("eps", 0.0)):  # type: ignore[arg-type]
        limit = eps * R.shape[1] ** 2 / len(R) ** 0.5
        norm = torch.linalg.vector_norm(R, dim=(1, 2), keepdim=True)
        R = torch.where(norm > limit, R * (limit / norm), R)
    D = _rotation.cayley((R - R.mT) * 0.5)
    return State(D.expand(int(delta.param("blocks", 1)), -1, -1))  # type: ignore[arg-type]


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    size = state.rotation.shape[1]
    for first in range(0, len(weight), size):
        rows = weight[first : first + size]
        D = state.rotation[(start + first) // size, : len(rows), : len(rows)]
        torch.mm(D.T, rows, out=out[first : first + size])
