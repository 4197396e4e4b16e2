"""A matrix that is decomposed: it may be larger than memory, so it is only ever multiplied.

Whoever has one in memory wraps it in `Dense`; whoever streams one from disk writes a class with the
same names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from weft.decompose._rough import Rough, multiplies_bfloat16

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_ROWS = 2**20  # elements of a block that is looked at in float64
_CHUNK = 512  # rows; the product with a few columns takes up to twice as long for all at once


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

    def rough(self) -> Rough | None:
        """The same in bfloat16, where that is at hand and multiplied faster."""

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows with the number of their first row, in order; together they are A."""


@dataclass(frozen=True)
class Dense:
    """A matrix in memory, on the CPU or on a device that multiplies faster.

    Attributes:
        values: (m, n).
        squares: ‖A‖², where it is known already.
        rounded: The same in bfloat16, where it is at hand.
    """

    values: Tensor
    squares: float | None = None
    rounded: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @cached_property
    def energy(self) -> float:
        if self.squares is not None:
            return self.squares
        return math.fsum(float(block.double().square().sum()) for _, block in self.rows())

    def matmul(self, X: Tensor) -> Tensor:
        A = self.values
        right = X.to(A.device, A.dtype)
        step = len(A) if A.is_cuda else _CHUNK
        parts = [A[start : start + step] @ right for start in range(0, len(A), step)]
        return torch.cat(parts).cpu().to(X.dtype)

    def rmatmul(self, Y: Tensor) -> Tensor:
        # The product of Yᵀ and A as it lies is up to half as fast again as that of Aᵀ and Y.
        A = self.values
        left = Y.T.to(A.device, A.dtype).contiguous()
        if A.is_cuda:
            return (left @ A).T.contiguous().cpu().to(Y.dtype)
        total = A.new_zeros(len(left), A.shape[1])
        for start in range(0, len(A), _CHUNK):
            total.addmm_(left[:, start : start + _CHUNK], A[start : start + _CHUNK])
        return total.T.contiguous().to(Y.dtype)

    def rough(self) -> Rough | None:
        if not multiplies_bfloat16(self.values.device):
            return None
        return Rough(self.values.bfloat16() if self.rounded is None else self.rounded)

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, _ROWS // max(self.values.shape[1], 1))
        for start in range(0, self.values.shape[0], step):
            yield start, self.values[start : start + step].cpu()


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

    def rough(self) -> Rough | None:
        rough = self.matrix.rough()
        return None if rough is None else replace(rough, turned=not rough.turned)

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        raise NotImplementedError("a matrix is read as it lies")


@dataclass(frozen=True)
class Resized:
    """factor · A, as a matrix of its own: AᵀA of very small or large numbers leaves float32.

    Attributes:
        matrix: A (m, n).
        factor: A power of two: nothing is rounded.
    """

    matrix: Matrix
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def energy(self) -> float:
        return self.matrix.energy * self.factor**2

    def matmul(self, X: Tensor) -> Tensor:
        return (self.matrix.matmul(X.double()) * self.factor).to(X.dtype)

    def rmatmul(self, Y: Tensor) -> Tensor:
        return (self.matrix.rmatmul(Y.double()) * self.factor).to(Y.dtype)

    def rough(self) -> Rough | None:
        return None

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        for start, block in self.matrix.rows():
            yield start, block * self.factor


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
