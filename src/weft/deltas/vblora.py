"""VB-LoRA (arXiv:2405.15179): W′ = W + B @ A, both made of the vectors of one bank.

`bank` (vectors, length). Each piece of `length` of a row of A, and of a column of B, is a mean of
vectors, weighted by the softmax of the `topk` largest of its logits: `logits_A` (r, in / length,
vectors), `logits_B` (out / length, r, vectors). Or what is left of those: `indices_A`, `indices_B`
with topk in place of vectors, and `weights_A`, `weights_B` of all but the last, which add up to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas import _indices, _low_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
TRANSPOSES = True


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    pieces_A, pieces_B = (shapes.get(f"logits_{n}") or shapes[f"indices_{n}"] for n in "AB")
    length, rank = shapes["bank"][1], pieces_A[0]
    factors = {"A": (rank, pieces_A[1] * length), "B": (pieces_B[0] * length, rank)}
    return _low_rank.orientations(factors, params, weight)


def prepare(delta: Delta, source: Source, blocks: Blocks) -> _low_rank.Factors:
    bank = source.whole("bank")
    A = _combine(delta, source, "A", bank).flatten(1)
    B = _combine(delta, source, "B", bank).transpose(1, 2).flatten(0, 1)
    if delta.param("transposed", False):
        return _low_rank.Factors(A.T, B.T, 1.0)
    return _low_rank.Factors(B, A, 1.0)


def square(state: _low_rank.Factors) -> float:
    return state.square()


def block(state: _low_rank.Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)


def _combine(delta: Delta, source: Source, factor: str, bank: Tensor) -> Tensor:
    """(…, topk) of indices and weights -> (…, length)."""
    if f"logits_{factor}" in dict(delta.tensors):
        topk = int(delta.param("topk", 0))  # type: ignore[arg-type]
        logits, indices = source.whole(f"logits_{factor}").topk(topk)
        weights = logits.softmax(-1)
    else:
        indices = _indices.load(delta, source, f"indices_{factor}", len(bank))
        weights = source.whole(f"weights_{factor}")
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    return (weights[..., None] * bank[indices]).sum(-2)
