"""Orthonormal bases by Gram matrices in float64: an order of magnitude faster than Householder's.

CholeskyQR2 (arXiv:1401.5171) divides by the Cholesky factor of the Gram matrix, twice; where that
matrix is singular, its eigenvectors say which directions there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_CHUNK = 2**15  # rows that are widened at once
_NEAR = 0.5  # ‖XᵀX − I‖: then X divided by its Cholesky factor is orthonormal to its dtype


def gram(X: Tensor, Y: Tensor | None = None) -> Tensor:
    """Xᵀ @ Y (of X itself without Y) in float64."""
    Y = X if Y is None else Y
    total = torch.zeros(X.shape[1], Y.shape[1], dtype=torch.float64)
    for start in range(0, X.shape[0], _CHUNK):
        left = X[start : start + _CHUNK].double()
        right = left if Y is X else Y[start : start + _CHUNK].double()
        total.addmm_(left.T, right)
    return total


def without(X: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """X − Q Qᵀ X for the blocks Q of an orthonormal basis, twice (twice is enough)."""
    for _ in range(2):
        for Q in basis:
            X = X.addmm(Q, Q.T @ X, alpha=-1)
    return X


def orthonormal(X: Tensor, basis: Sequence[Tensor], floor: float) -> Tensor:
    """An orthonormal basis of what the columns of X add to `basis`.

    Args:
        X: (d, k).
        basis: Blocks of orthonormal columns, orthogonal to each other.
        floor: Columns, or combinations of them, that add less are rounding, and are left out.
    """
    X = without(X, basis)
    for _ in range(2):
        square = gram(X)
        sizes = square.diagonal().sqrt()
        kept = sizes > floor
        if not bool(kept.all()):
            X, square, sizes = X[:, kept], square[kept][:, kept], sizes[kept]
        if not X.shape[1]:
            return X
        scaled = square / sizes / sizes[:, None]
        factor, failed = torch.linalg.cholesky_ex(scaled)
        steep = factor.diagonal()
        if int(failed) or float(steep.min()) < 1e-5:
            X = _by_eigenvectors(X, square, floor)
        else:
            inverse = torch.linalg.inv(factor).T / sizes[:, None]
            X = X @ inverse.to(X.dtype)
        X = without(X, basis) if basis else X
        if float((scaled - torch.eye(len(scaled))).norm()) < _NEAR:
            break  # a basis that was all but orthonormal: once is enough
        floor = 0.5  # what was orthonormal a moment ago, and has lost its length, was rounding
    return X


def _by_eigenvectors(X: Tensor, square: Tensor, floor: float) -> Tensor:
    values, vectors = torch.linalg.eigh(square)
    kept = values > max(floor**2, 1e-13 * float(values[-1]))
    found: Tensor = X @ (vectors[:, kept] / values[kept].sqrt()).to(X.dtype)
    return found


def whitened(Y: Tensor, square: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Q with orthonormal columns and R (float64) so that Y = Q R; directions sorted by size.

    Directions below rounding are left out. `square` is YᵀY, where it is known.
    """
    values, vectors = torch.linalg.eigh(gram(Y) if square is None else square)
    kept = values > max(1e-13 * float(values[-1]), 1e-300)
    values, vectors = values[kept].flip(0).sqrt(), vectors[:, kept].flip(1)
    return Y @ (vectors / values).to(Y.dtype), values[:, None] * vectors.T


def roughly_whitened(Y: Tensor) -> tuple[Tensor, Tensor]:
    """The same, orthonormal to what float32 sums tell."""
    return whitened(Y, (Y.T @ Y).double())


def bordered(T: Tensor, column: Tensor) -> Tensor:
    """The symmetric T (l, l) with further columns (l + k, k), and the same as rows."""
    old, size = len(T), len(column)
    wider = T.new_zeros(size, size)
    wider[:old, :old] = T
    wider[:, old:] = column
    wider[old:] = column.T
    wider[old:, old:] = (column[old:] + column[old:].T) / 2
    return wider
