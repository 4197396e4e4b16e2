"""AdaLoRA (arXiv:2303.10512): W′ = W + scaling / (rank + 1e-5) · B @ diag(E) @ A.

`A` (r, in · kernel), `E` (r, 1), `B` (out, r). `rank` is the one that training began with, and r
what its budget left of it: 0, too, and then W stays as it is. `transposed` as in LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from weft.deltas import _low_rank
from weft.deltas._low_rank import orientations

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import Delta
    from weft.deltas import Blocks, Source

__all__ = ["ADDITIVE", "SILENT", "TRANSPOSES", "block", "orientations", "prepare", "square"]

ADDITIVE = True
SILENT = ("A", "B", "E")
TRANSPOSES = True


@dataclass(frozen=True, slots=True)
class State:
    """scaling · B @ diag(E) @ A, and what it is divided by."""

    factors: _low_rank.Factors
    divisor: float


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    factors, E = _low_rank.load(delta, source), source.whole("E")
    if delta.param("transposed", False):
        factors = replace(factors, left=factors.left * E.T)
    else:
        factors = replace(factors, right=factors.right * E)
    return State(factors, float(delta.param("rank", 0)) + 1e-5)  # type: ignore[arg-type]


def square(state: State) -> float:
    return state.factors.square() / state.divisor**2


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    state.factors.product(start, out)
    out.div_(state.divisor)
