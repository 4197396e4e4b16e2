"""scaling · Leftₑ @ Rightₑ for every expert e: what the kinds for fused experts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.blocks import MIN_ROWS
from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Param, Shape


@dataclass(frozen=True, slots=True)
class Stack:
    """ΔW (E, d1, d2) = scaling · left @ right, `left` (E, d1, r) and `right` (E, r, d2)."""

    left: Tensor
    right: Tensor
    scaling: float

    def product(self, start: int, out: Tensor) -> None:
        """Rows of ΔW, seen as (E · d1, d2), into `out`."""
        rows = self.left.shape[1]
        stop = start + out.shape[0]
        at = start
        while at < stop:
            expert, first = divmod(at, rows)
            last = min(rows, first + stop - at)
            into = out[at - start : at - start + last - first]
            torch.mm(self.left[expert, first:last], self.right[expert], out=into)
            at += last - first
        if self.scaling != 1:
            out.mul_(self.scaling)

    def square(self) -> float:
        """‖ΔW‖² = scaling² · Σ tr(LᵀL · RRᵀ), in float64."""
        total = 0.0
        for left, right in zip(self.left, self.right, strict=True):
            wide, high = left.double(), right.double()
            total += float(((wide.T @ wide) * (high @ high.T)).sum())
        return self.scaling**2 * total


def down(A: Tensor, experts: int) -> Tensor:
    """A (E · r, in), which has the rows of an expert together -> (E, r, in)."""
    return A.view(experts, A.shape[0] // experts, A.shape[1])


def up(B: Tensor, experts: int, *, grouped: bool) -> Tensor:
    """B (out, r · E) -> (E, out, r).

    Where it is `grouped` the columns of an expert lie together; else the expert runs fastest.
    """
    rank = B.shape[1] // experts
    if grouped:
        return B.view(B.shape[0], experts, rank).permute(1, 0, 2)
    return B.view(B.shape[0], rank, experts).permute(2, 0, 1)


def matrix(shape: Shape) -> tuple[int, int]:
    return shape[0] * shape[1], shape[2]


def together(shape: Shape, params: Mapping[str, Param]) -> int:
    """Rows that divide an expert's, and are enough for bits that do not depend on their number."""
    rows = shape[1]
    return next((n for n in range(MIN_ROWS, rows) if rows % n == 0), max(rows, 1))
