"""Factors of low rank, against dense products in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weft.decompose.factors import split, svd_of_product


@pytest.mark.parametrize(("rows", "columns", "rank"), [(60, 40, 8), (5, 90, 8), (90, 5, 8)])
def test_product_has_the_svd_of_the_dense_matrix(rows: int, columns: int, rank: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    B = torch.randn(rows, rank, generator=numbers)
    A = torch.randn(rank, columns, generator=numbers)
    left, values, right = svd_of_product(B, A)
    dense = B.double() @ A.double()
    expected = np.linalg.svd(dense.numpy(), compute_uv=False)[: len(values)]
    assert np.allclose(values.numpy(), expected, atol=1e-12 * expected[0])
    assert torch.allclose((left * values) @ right.T, dense, atol=1e-12)
    small_A, small_B = split(left, values, right)
    assert torch.allclose(small_B @ small_A, dense, atol=1e-12)
    norms = small_A.norm(dim=1), small_B.norm(dim=0)
    assert torch.allclose(*norms)


def test_product_of_dependent_and_of_zero_factors() -> None:
    numbers = torch.Generator().manual_seed(1)
    B = torch.randn(30, 2, generator=numbers).repeat(1, 4)
    A = torch.randn(8, 20, generator=numbers)
    values = svd_of_product(B, A)[1]
    assert float(values[1]) > 1
    assert float(values[2:].max()) < 1e-12 * float(values[0])
    assert not svd_of_product(B, 0 * A)[1].any()
