"""Weights of rows and columns, and matrices that are multiplied by them."""

from __future__ import annotations

import math

import pytest
import torch

from weft.decompose.even import Evening, Weights, unweighted, weighted
from weft.decompose.krylov import truncated_svd
from weft.decompose.matrices import Dense
from weft.decompose.noise import ulp_of, uneven

SHAPE = (300, 200)


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(seed: int = 0) -> torch.Tensor:
    """Variances whose rows and columns differ by orders of magnitude, and chance beside."""
    rows, columns = gaussian(SHAPE[0], seed=seed).exp(), gaussian(SHAPE[1], seed=seed + 1).exp()
    return (rows[:, None] * columns).square() * gaussian(*SHAPE, seed=seed + 2).square()


def found(v: torch.Tensor, step: int = 100) -> Weights:
    even = Evening(v.shape[1], 1e-8)
    for block in v.split(step):
        even.add(block)
    weights = even.weights()
    assert weights is not None
    return weights


def test_rows_and_columns_have_one_mean_and_that_of_all_stays() -> None:
    v = spread()
    weights = found(v)
    even = weights.rows.square()[:, None] * v * weights.columns.square()
    mean = float(v.mean())
    torch.testing.assert_close(even.mean(0), torch.full((SHAPE[1],), mean), rtol=1e-3, atol=0)
    # one step is not the end of the iteration: rows come near it
    assert float((even.mean(1) / mean - 1).abs().median()) < 0.25
    assert float((v.mean(1) / mean).log().std()) > 1.5


def test_the_noise_of_large_rows_does_not_stand_out() -> None:
    v = spread()
    noise = v.sqrt() * gaussian(*SHAPE, seed=9).sign()
    weights = found(v)
    edge = math.sqrt(float(v.mean())) * sum(math.sqrt(side) for side in SHAPE)
    even = weights.rows[:, None] * noise * weights.columns
    assert float(torch.linalg.svdvals(even)[0]) < 1.05 * edge
    assert float(torch.linalg.svdvals(noise)[0]) > 2 * edge


def test_zeros_have_weights_that_are_finite() -> None:
    v = spread()
    v[:70], v[:, 3] = 0, 0
    weights = found(v)
    assert bool(weights.rows.isfinite().all())
    assert bool(weights.columns.isfinite().all())
    nothing = Evening(4, 1e-8)
    assert nothing.weights() is None
    nothing.add(torch.zeros(3, 4))
    assert nothing.weights() is None


def test_weighted_is_the_product_of_three() -> None:
    A = gaussian(*SHAPE, seed=3)
    weights = found(spread())
    product = weights.rows[:, None] * A * weights.columns
    even = weighted(Dense(A), weights)
    X, Y = gaussian(SHAPE[1], 5, seed=4), gaussian(SHAPE[0], 5, seed=5)
    torch.testing.assert_close(even.matmul(X), product @ X, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(even.rmatmul(Y), product.T @ Y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.cat([block for _, block in even.rows()]), product)
    assert even.energy == pytest.approx(float(product.double().square().sum()))
    left, right = weights.of(Y, X)
    for back, before in zip(weights.back(left, right), (Y, X), strict=True):
        torch.testing.assert_close(back, before)


def test_weights_are_taken_back_from_a_factorisation() -> None:
    """Its error is that of A; a proof of the best in the even norm stays one of as much."""
    A = gaussian(*SHAPE, seed=3)
    weights = found(spread())
    even = weighted(Dense(A), weights)
    svd = truncated_svd(even, 12)
    plain = unweighted(svd, even)
    approximation = plain.left * plain.values @ plain.right.T
    product = (weights.rows[:, None] * A * weights.columns).double()
    again = weights.rows[:, None] * approximation * weights.columns
    least = float(torch.linalg.svdvals(product)[12:].norm())
    assert float((product - again).norm()) == pytest.approx(least, rel=2e-3)
    torch.testing.assert_close(plain.left.T @ plain.left, torch.eye(12).double())
    assert plain.error == pytest.approx(float((A - approximation).square().sum()), rel=1e-4)
    assert plain.energy == pytest.approx(float(A.double().square().sum()))
    assert plain.bound == pytest.approx(svd.bound, rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_how_noise_is_spread_goes_with_the_square_of_ulps(dtype: str) -> None:
    W = (gaussian(*SHAPE, seed=1) * 10 ** (2 * gaussian(*SHAPE, seed=2)).clamp(-3, 3)).to(
        getattr(torch, dtype)
    )
    ratio = uneven(W, dtype).double() / ulp_of(W, dtype).double().square()
    assert bool((ratio == ratio[0, 0]).all())
