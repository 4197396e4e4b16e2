"""The noise of rounding, against roundings that were made, and what is told of an update by it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from weft.decompose.noise import Noise, rounding, scaled_ulps, signal, ulps

SHAPE = (512, 384)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def weights(dtype: str = "bfloat16") -> torch.Tensor:
    return (0.02 * gaussian(*SHAPE, seed=9)).to(getattr(torch, dtype))


def rounded(
    W: torch.Tensor, delta: torch.Tensor, dtype: str = "bfloat16"
) -> tuple[torch.Tensor, Noise]:
    """What is seen of `delta` when W + delta is rounded, and the noise that is told of it."""
    tuned = (W.double() + delta).to(getattr(torch, dtype))
    D = tuned.double() - W.double()
    on_grid = bool((W.to(tuned.dtype).double() == W.double()).all())
    return D, rounding(ulps(tuned, dtype), float(D.square().mean()), on_grid=on_grid)


def left(D: torch.Tensor, delta: torch.Tensor) -> float:
    """The variance of what of D does not go with delta."""
    along = (D * delta).sum() / delta.square().sum()
    return float((D - along * delta).square().mean())


def test_ulp_is_the_distance_to_the_next_number() -> None:
    """Against numpy's `spacing`, and for bfloat16 against the bits."""
    numbers = np.random.default_rng(0)
    half = (numbers.standard_normal(4000) * 10.0 ** numbers.integers(-9, 4, 4000)).astype(
        np.float16
    )
    half[:3] = (0, 2**-14, -(2**-20))
    expected = np.mean(np.abs(np.spacing(np.abs(half))).astype(np.float64) ** 2)
    assert ulps(torch.from_numpy(half), "float16").mean_square == pytest.approx(expected)
    single = half.astype(np.float32) * np.float32(1.37)
    expected = np.mean(np.spacing(np.abs(single)).astype(np.float64) ** 2)
    found = ulps(torch.from_numpy(single), "float32")
    assert found.mean_square == pytest.approx(expected, rel=1e-6)
    assert math.fsum(found.shares) == pytest.approx(1)
    brain = torch.from_numpy(single).bfloat16()
    after = (brain.abs().view(torch.int16) + 1).view(torch.bfloat16).double()
    expected = float((after - brain.abs().double()).square().mean())
    assert ulps(brain, "bfloat16").mean_square == pytest.approx(expected)
    assert ulps(brain.float(), "bfloat16").mean_square == pytest.approx(expected)
    assert ulps(torch.zeros(0), "bfloat16").mean_square == 0


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_ulp_of_scaled_numbers_is_the_distance_to_the_next(dtype: str) -> None:
    """Against the bits of every finite float8 but the largest, each with a scale of its own."""
    numbers = torch.arange(0x7E if dtype == "float8_e4m3fn" else 0x7B, dtype=torch.uint8)
    now, following = (n.view(getattr(torch, dtype)).double() for n in (numbers, numbers + 1))
    scale = torch.linspace(1e-5, 3e-4, len(numbers), dtype=torch.float64)
    expected = float((scale * (following - now)).square().mean())
    weights = torch.cat([now * scale, -now * scale]).float()
    found = scaled_ulps(weights, torch.cat([scale, scale]).float(), dtype)
    assert found.mean_square == pytest.approx(expected, rel=0.01)
    assert math.fsum(found.shares) == pytest.approx(1)
    assert scaled_ulps(torch.zeros(3), torch.zeros(3), dtype).mean_square == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [0.02, 0.1, 0.3, 1, 3, 30])
def test_noise_of_updates_from_a_small_part_of_an_ulp_to_many(dtype: str, size: float) -> None:
    W = weights(dtype)
    ulp = 0.02 * 2.0 ** (-7 if dtype == "bfloat16" else -10)
    delta = size * ulp * gaussian(*SHAPE, seed=1)
    D, noise = rounded(W, delta, dtype)
    assert noise.variance == pytest.approx(left(D, delta), rel=0.05)
    if size <= 0.1:  # where the uniform error is more than all of D
        assert noise.uniform > 1.5 * float(D.square().mean())
    if size > 2:
        assert noise.variance == pytest.approx(noise.uniform, rel=0.03)


@pytest.mark.parametrize("size", [0.05, 1])
def test_a_base_that_was_not_rounded_before_gives_uniform_noise(size: float) -> None:
    W = 0.02 * gaussian(*SHAPE, seed=9)
    delta = size * 0.02 * 2.0**-7 * gaussian(*SHAPE, seed=1)
    D, noise = rounded(W, delta)
    assert noise.variance == noise.uniform == pytest.approx(left(D, delta), rel=0.06)


@pytest.mark.parametrize(("dtype", "rank"), [("bfloat16", 16), ("float16", 12)])
def test_signal_of_a_merged_adapter_is_its_rank(dtype: str, rank: int) -> None:
    delta = 3e-4 * gaussian(SHAPE[0], rank, seed=2) @ gaussian(rank, SHAPE[1], seed=3)
    D, noise = rounded(weights(dtype), delta, dtype)
    values = torch.linalg.svdvals(D).tolist()
    found = signal(values, noise, SHAPE, float(D.square().sum()))
    assert (found.rank, found.known, found.fits) == (rank, True, True)
    assert found.kept == pytest.approx(1, abs=0.01)
    assert values[rank] == pytest.approx(noise.edge(SHAPE), rel=0.05)


@pytest.mark.parametrize("rank", [1, 4, 16, 32])
def test_an_adapter_above_the_edge_comes_back_whose_updates_are_below_an_ulp(rank: int) -> None:
    """Its rounding has structure, and singular values above the edge of noise that has none."""
    W = weights()
    edge = Noise(*2 * [ulps(W, "bfloat16").mean_square / 12]).edge(SHAPE)
    Q, P = (
        torch.linalg.qr(gaussian(n, rank, seed=seed)).Q for seed, n in enumerate(SHAPE, start=5)
    )
    sizes = torch.linspace(4.5, 3, rank, dtype=torch.float64)
    D, noise = rounded(W, edge * sizes * Q @ P.T)
    values = torch.linalg.svdvals(D).tolist()
    found = signal(values, noise, SHAPE, float(D.square().sum()))
    assert found.rank == rank
    if rank == 1:
        assert sum(value > 1.02 * noise.edge(SHAPE) for value in values) > 1


@pytest.mark.parametrize("size", [0.05, 0.1])
def test_a_model_tuned_in_full_by_updates_below_an_ulp(size: float) -> None:
    """What is taken comes about as near to the update as any rank of D does."""
    U, _, Vh = torch.linalg.svd(gaussian(*SHAPE, seed=4), full_matrices=False)
    delta = U * torch.arange(1, 385, dtype=torch.float64) ** -0.5 @ Vh
    delta *= size * 0.02 * 2.0**-7 / delta.square().mean().sqrt()
    D, noise = rounded(weights(), delta)
    left_, values, right = torch.linalg.svd(D, full_matrices=False)
    whole = float(D.square().sum())
    found = signal(values.tolist(), noise, SHAPE, whole)
    # ‖δ‖² − ‖δ − D_r‖² of every rank r
    along = ((left_.T @ delta) * right).sum(1)
    gain = (2 * values * along - values.square()).cumsum(0)
    assert float(gain[found.rank - 1]) > 0.85 * float(gain.max())
    assert found.fits
    above = sum(value > Noise(*2 * [noise.uniform]).edge(SHAPE) for value in values.tolist())
    assert found.rank > 4 * max(above, 1)  # which is what uniform noise would leave of it


def test_of_an_update_without_structure_nothing_is_taken() -> None:
    for size in (0.05, 0.1):
        D, noise = rounded(weights(), size * 1.6e-4 * gaussian(*SHAPE, seed=6))
        found = signal(torch.linalg.svdvals(D).tolist(), noise, SHAPE, float(D.square().sum()))
        assert (found.rank, found.known) == (0, True)


def test_noise_that_is_not_as_expected_is_said() -> None:
    """Both models rounded, each from what was never stored: twice the noise."""
    delta = 3e-4 * gaussian(SHAPE[0], 4, seed=2) @ gaussian(4, SHAPE[1], seed=3)
    W = 0.02 * gaussian(*SHAPE, seed=9)
    D, noise = rounded(W.bfloat16(), delta + W - W.bfloat16().double())
    found = signal(torch.linalg.svdvals(D).tolist(), noise, SHAPE, float(D.square().sum()))
    assert found.fits is False


def test_what_cannot_be_told() -> None:
    noise = Noise(1e-6, 1e-6)
    edge = noise.edge(SHAPE)
    assert edge == pytest.approx(1e-3 * (math.sqrt(512) + math.sqrt(384)))
    energy = 81 * edge**2 + 1e-6 * 512 * 384
    assert signal([9 * edge, 0.9 * edge], noise, SHAPE, energy).fits is True
    assert signal([9 * edge, 0.9 * edge], noise, SHAPE, 2 * energy).fits is False
    alone = signal([9 * edge], noise, SHAPE, energy)
    assert (alone.known, alone.fits) == (False, None)
    nothing = signal([1.0, 0.5], Noise(), SHAPE, 1.25)
    assert (nothing.rank, nothing.known, nothing.fits, nothing.kept) == (2, False, None, 1.0)
