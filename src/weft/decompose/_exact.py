"""The full factorisation, where it costs less than an approximate one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weft.decompose._orthogonal import gram

if TYPE_CHECKING:
    from torch import Tensor

    from weft.decompose.matrices import Matrix


def cheaper(rows: int, columns: int, rank: int) -> bool:
    """Whether a full factorisation costs less than an iteration to `rank`."""
    short = min(rows, columns)
    return short <= 128 or rank > short // 12


def svd(matrix: Matrix, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, rank), Σ (rank) in float64 and V (n, rank) of the exact factorisation, cut."""
    rows, columns = matrix.shape
    if max(rows, columns) < 2 * min(rows, columns):
        A = torch.cat([block for _, block in matrix.rows()])
        left, values, right = torch.linalg.svd(A, full_matrices=False)
        return left[:, :rank], values[:rank].double(), right[:rank].T
    return _by_gram(matrix, rank)


def _by_gram(matrix: Matrix, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """By the eigenvectors of AᵀA or AAᵀ, whichever is smaller, in float64."""
    rows, columns = matrix.shape
    wide = rows < columns
    if wide:
        A = torch.cat([block for _, block in matrix.rows()])
        square = gram(A.T)
    else:
        square = torch.zeros(columns, columns, dtype=torch.float64)
        for _, block in matrix.rows():
            square += gram(block)
    vectors = torch.linalg.eigh(square)[1]
    basis = vectors[:, -rank:].flip(1)
    image = (matrix.rmatmul if wide else matrix.matmul)(basis.to(torch.float32))
    sizes = _squares(image).sqrt()
    other = image / sizes.clamp_min(1e-300).to(image.dtype)
    basis = basis.to(image.dtype)
    return (basis, sizes, other) if wide else (other, sizes, basis)


def _squares(X: Tensor) -> Tensor:
    """‖x‖² of each column, in float64."""
    return X.double().square().sum(0)
