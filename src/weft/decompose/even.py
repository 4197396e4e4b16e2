"""Weights of rows and columns that make uneven noise even.

Where the rows of a matrix differ in size their rounding does, and the largest rows' noise stands
out of the mean noise as if it were signal. Of noise D whose variances vᵢⱼ are known,
diag(a) D diag(b) has the singular values of even noise, and of a signal the same rank, if all rows
and all columns of aᵢ² vᵢⱼ bⱼ² have one mean (Landa, Zhang & Kluger, 2022, "Biwhitening reveals the
rank of a count matrix"). Sinkhorn's iteration (1967) finds such a and b; a step of it, rows and
then columns, comes near enough, and needs no second look at the elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from weft.core.sums import dot
from weft.decompose.factors import svd_of_product
from weft.decompose.matrices import residual

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from weft.decompose._rough import Rough
    from weft.decompose.krylov import Svd
    from weft.decompose.matrices import Matrix

_TINY = 1e-30  # what float32 divides by
_SMALL = 1e-24
_CHUNK = 64  # rows, after which more is known of the columns


@dataclass(frozen=True, slots=True)
class Weights:
    """By which rows and columns are multiplied.

    Attributes:
        rows: a (m), float32.
        columns: b (n).
    """

    rows: Tensor
    columns: Tensor

    @property
    def largest(self) -> float:
        """That of any element, a b."""
        return float(self.rows.max()) * float(self.columns.max())

    def of(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of diag(a) L Rᵀ diag(b), (m, k) and (n, k)."""
        return left * self.rows[:, None].to(left), right * self.columns[:, None].to(right)

    def back(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """What `of` has made of them, taken back."""
        return left / self.rows[:, None].to(left), right / self.columns[:, None].to(right)


class Evening:
    """Finds the weights for elements vᵢⱼ ≥ 0 that are seen once, by blocks of rows in order.

    A row's mean is taken of what the columns seen so far make even: one column that is much larger
    than the others would decide it otherwise.

    Args:
        columns: How many.
        least: Of the mean: rows and columns with less, such as those of zeros, are weighted as if
            they had so much.
        before: b of a similar matrix, from which the iteration goes on.
    """

    def __init__(self, columns: int, least: float, before: Tensor | None = None) -> None:
        self._least = least
        self._known = None if before is None else before.double().square()
        self._rows: list[Tensor] = []
        self._columns = torch.zeros(columns, dtype=torch.float64)
        self._total = 0.0

    def add(self, block: Tensor) -> None:
        """(rows, n) of vᵢⱼ, in any unit."""
        self._total += float(block.sum(1).double().sum())
        for some in torch.split(block, _CHUNK):
            if self._known is None:
                rows = some.sum(1).clamp_min(_TINY)
                self._known = self._evened((rows.reciprocal() @ some).cpu().double())
            rows = some @ self._known.to(some)
            self._columns += (rows.clamp_min(_TINY).reciprocal() @ some).cpu().double()
            self._rows.append(rows.cpu().double())
            self._known = self._evened(self._columns)

    def weights(self) -> Weights | None:
        """Under which the mean of all stays what it is; None where all are zero, or none."""
        if not self._rows:
            return None
        rows = torch.cat(self._rows)
        mean = self._total / (len(rows) * len(self._columns))
        if not 0 < mean < math.inf:
            return None
        rows = rows.clamp_min(self._least * float(rows.mean()))
        return Weights(
            (mean * len(rows) / rows).sqrt().float(), self._evened(self._columns, 1).sqrt().float()
        )

    def _evened(self, columns: Tensor, mean: float | None = None) -> Tensor:
        """b² of the sums of columns; their mean is taken for 1, where it is not given."""
        size = float(columns.mean())
        if not size:
            return torch.ones_like(columns)
        least = columns.clamp_min(self._least * size)
        return (size if mean is None else mean) / least


@dataclass(frozen=True)
class Weighted:
    """diag(a) A diag(b), as a matrix of its own.

    Attributes:
        matrix: A (m, n).
        weights: a and b.
        energy: ‖diag(a) A diag(b)‖².
    """

    matrix: Matrix
    weights: Weights
    energy: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def matmul(self, X: Tensor) -> Tensor:
        product = self.matrix.matmul(X * self.weights.columns[:, None].to(X))
        return product * self.weights.rows[:, None].to(product)

    def rmatmul(self, Y: Tensor) -> Tensor:
        product = self.matrix.rmatmul(Y * self.weights.rows[:, None].to(Y))
        return product * self.weights.columns[:, None].to(product)

    def rough(self) -> Rough | None:
        rough = self.matrix.rough()
        if rough is None:
            return None
        values = rough.values * self.weights.rows[:, None].to(rough.values)
        return replace(rough, values=values.mul_(self.weights.columns.to(values)))

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        for start, block in self.matrix.rows():
            a = self.weights.rows[start : start + len(block), None].to(block)
            yield start, block * a * self.weights.columns.to(block)


def weighted(matrix: Matrix, weights: Weights) -> Weighted:
    """`matrix` with its rows and columns multiplied."""
    found = Weighted(matrix, weights, 0.0)
    squares = math.fsum(dot(block, block) for _, block in found.rows())
    if not _SMALL < squares < math.inf:  # what float32 adds of squares
        squares = math.fsum(float(block.double().square().sum()) for _, block in found.rows())
    return replace(found, energy=squares)


def unweighted(found: Svd, even: Weighted) -> Svd:
    """diag(1/a) U Σ Vᵀ diag(1/b) of the SVD of diag(a) A diag(b), as an SVD of its own.

    Its error is taken of A, entry by entry. What the best of A's approximations leave is not
    known: `excess` is that in the even norm, as a share of the error.
    """
    matrix = even.matrix
    left, right = even.weights.back(found.left, found.right * found.values.to(found.right))
    U, values, V = svd_of_product(left, right.T)
    error = residual(matrix, left.float(), right.float())
    share = error / found.error if found.error else 0.0
    return replace(
        found,
        left=U,
        values=values,
        right=V,
        energy=matrix.energy,
        error=error,
        excess=found.excess * share,
    )
