"""KaSA (arXiv:2412.06071): W′ = trunc(W) + scaling · B @ diag(d) @ A.

`A` (r, in), `B` (out, r), `diag` (r,). trunc(W) is W without its r smallest singular values. Those
come from the eigenvectors of WᵀW or WWᵀ, whichever is smaller, in float64: that is more exact than
a decomposition of W in float32, and the price is k³ operations, k = min(out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas import _low_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = False


@dataclass(frozen=True, slots=True)
class State:
    """What is added, and what W loses: `left` (out, r) @ `right` (r, in)."""

    factors: _low_rank.Factors
    left: Tensor
    right: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    rank = shapes["A"][0]
    fits = weight == (shapes["B"][0], shapes["A"][1]) and shapes["diag"] == (rank,)
    return (False,) if fits and rank < min(weight) else ()


def scratch(shape: Shape) -> int:
    """In float64: the square, its vectors and the room to find them; and a wide W itself."""
    rows, columns = shape
    return 8 * (4 * min(shape) ** 2 + (rows * columns if columns > rows else 0))


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    B = source.whole("B") * source.whole("diag")
    factors = _low_rank.Factors(B, source.whole("A"), delta.scaling)
    left, right = _smallest(source.shape, factors.right.shape[0], blocks)
    return State(factors, left.to(B.dtype), right.to(B.dtype))


def _smallest(shape: Shape, rank: int, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The part of W that belongs to its `rank` smallest singular values, as two factors."""
    rows, columns = shape
    if columns <= rows:
        gram = sum(block.double().T @ block.double() for _, block in blocks())
        _, vectors = torch.linalg.eigh(gram)  # ascending
        right = vectors[:, :rank]
        return torch.cat([block.double() @ right for _, block in blocks()]), right.T.contiguous()
    whole = torch.cat([block.double() for _, block in blocks()])
    _, vectors = torch.linalg.eigh(whole @ whole.T)
    left = vectors[:, :rank]
    return left.contiguous(), left.T @ whole


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    state.factors.product(start, out)
    out.add_(weight)
    out.sub_(state.left[start : start + out.shape[0]] @ state.right)
