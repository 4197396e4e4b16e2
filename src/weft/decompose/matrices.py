"""A matrix that is decomposed: it may be larger than memory, so it is only ever multiplied.

Whoever has one in memory wraps it in `Dense`; whoever streams one from disk writes a class with the
same five names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_ROWS = 2**20  # elements of a block that is looked at in float64


class Matrix(Protocol):
    """A (m, n), in float32 (or float64)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def energy(self) -> float:
        """‖A‖² = Σ a², accumulated in float64."""

    def matmul(self, X: Tensor) -> Tensor:
        """A @ X (m, k), for X (n, k)."""

    def rmatmul(self, Y: Tensor) -> Tensor:
        """Aᵀ @ Y (n, k), for Y (m, k)."""

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows with the number of their first row, in order; together they are A."""


@dataclass(frozen=True)
class Dense:
    """A matrix in memory."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @cached_property
    def energy(self) -> float:
        return math.fsum(float(block.double().square().sum()) for _, block in self.rows())

    def matmul(self, X: Tensor) -> Tensor:
        return self.values @ X

    def rmatmul(self, Y: Tensor) -> Tensor:
        # The product of Yᵀ and A as it lies is up to half as fast again as that of Aᵀ and Y.
        return (Y.T @ self.values).T.contiguous()

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, _ROWS // max(self.values.shape[1], 1))
        for start in range(0, self.values.shape[0], step):
            yield start, self.values[start : start + step]


@dataclass(frozen=True)
class Turned:
    """Aᵀ, as a matrix of its own."""

    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return columns, rows

    @property
    def energy(self) -> float:
        return self.matrix.energy

    def matmul(self, X: Tensor) -> Tensor:
        return self.matrix.rmatmul(X)

    def rmatmul(self, Y: Tensor) -> Tensor:
        return self.matrix.matmul(Y)

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        raise NotImplementedError("a matrix is read as it lies")


def residual(matrix: Matrix, left: Tensor, right: Tensor) -> float:
    """‖A − left @ rightᵀ‖², entry by entry: for differences that lie in ‖A‖²'s rounding.

    Args:
        matrix: A (m, n).
        left: (m, k).
        right: (n, k).
    """
    total = []
    for start, block in matrix.rows():
        rest = block - left[start : start + block.shape[0]] @ right.T
        total.append(float(rest.double().square().sum()))
    return math.fsum(total)
