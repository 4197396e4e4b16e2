"""LoRA (arXiv:2106.09685): W′ = W + scaling · B @ A.

`A` (r, in), `B` (out, r). `transposed`: W is stored (in, out), as in transformers' Conv1D and in
Embedding, and ΔW is (B @ A)ᵀ. rsLoRA (arXiv:2312.03732) differs in the scaling alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.deltas._low_rank import Factors, load, orientations

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import Delta
    from weft.deltas import Blocks, Source

__all__ = ["ADDITIVE", "SILENT", "TRANSPOSES", "add", "block", "orientations", "prepare", "square"]

ADDITIVE = True
SILENT = ("A", "B")
TRANSPOSES = True


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Factors:
    return load(delta, source)


def square(state: Factors) -> float:
    return state.square()


def block(state: Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)


def add(state: Factors, weight: float, start: int, out: Tensor) -> None:
    """`out` += weight · ΔW, in one pass."""
    state.add(weight, start, out)
