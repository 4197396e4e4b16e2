"""HiRA (ICLR 2025, openreview TwJrTz9cRS): W′ = W + W ⊙ (B @ A).

`A` (r, in, kernel…), `B` (out, r, 1…). `transposed` as in LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.deltas._low_rank import Factors, load, orientations

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import Delta
    from weft.deltas import Blocks, Source

__all__ = ["ADDITIVE", "SILENT", "TRANSPOSES", "block", "orientations", "prepare"]

ADDITIVE = True
SILENT = ("A", "B")
TRANSPOSES = True


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Factors:
    return load(delta, source)


def block(state: Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)
    out.mul_(weight)
