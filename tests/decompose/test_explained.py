"""What each element says of the update that was rounded, and how many directions explain all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from weft.decompose.even import Evening
from weft.decompose.explained import Score, explained, random_signs, scored
from weft.decompose.krylov import truncated_svd
from weft.decompose.matrices import Dense
from weft.decompose.noise import rounding, ulp_of, ulps

SHAPE = (320, 256)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


class Held:
    """A difference in memory."""

    def __init__(self, W: torch.Tensor, delta: torch.Tensor) -> None:
        tuned = (W.double() + delta).bfloat16()
        self.D = (tuned.double() - W.double()).float()
        self.ulp = ulp_of(tuned, "bfloat16")
        self.shape = (len(W), W.shape[1])
        mean_square = float(self.D.double().square().mean())
        self.update = rounding(ulps(tuned, "bfloat16"), mean_square, on_grid=True).update

    def score(self, left: torch.Tensor, right: torch.Tensor, variance: float) -> Score:
        self.S, sure = scored(self.D, self.ulp, left @ right.T, variance)
        return Score(Dense(self.S), float(self.S.square().mean()), float(sure.mean()))

    def flip(self, key: int) -> None:
        self.S *= random_signs(*self.shape, key)

    def rank(self, guess: int) -> int | None:
        return explained(self, truncated_svd(Dense(self.D), guess).right, self.update, 7)


def log_likelihood(D: float, ulp: float, M: float, variance: float) -> float:
    """Of an interval turned to the side where tails are exact."""
    low = (abs(D - M) - ulp / 2) / math.sqrt(2 * variance)
    high = (abs(D - M) + ulp / 2) / math.sqrt(2 * variance)
    return math.log((math.erfc(low) - math.erfc(high)) / 2)


@pytest.mark.parametrize("ulp", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("away", [-3.0, -0.7, 0.0, 0.3, 2.5])
def test_score_is_the_derivative_of_the_likelihood(ulp: float, away: float) -> None:
    variance, step = 0.64, 1e-3
    S, sure = scored(torch.tensor([away]), torch.tensor([ulp]), torch.tensor([0.0]), variance)
    low, here, high = (log_likelihood(away, ulp, M, variance) for M in (-step, 0, step))
    slope, bend = (high - low) / (2 * step), (high - 2 * here + low) / step**2
    assert float(S) == pytest.approx(slope * math.sqrt(variance), abs=1e-4)
    assert float(sure) == pytest.approx(-bend * variance, abs=2e-4)


def test_score_far_from_what_is_tried_is_finite_and_grows() -> None:
    D = torch.tensor([0.0, 10, 100, -100, 1e4])
    S, sure = scored(D, torch.full((5,), 1e-9), torch.zeros(5), 1.0)
    torch.testing.assert_close(S, D, rtol=0.02, atol=1e-6)
    assert bool(((sure >= 0) & (sure <= 1)).all())
    # of an ulp of many deviations nothing is known, and no number is so small that it is slow
    S, _ = scored(torch.zeros(100), torch.linspace(10, 60, 100), torch.zeros(100), 1.0)
    assert not bool(S.any())


def test_random_signs_are_those_of_their_rows() -> None:
    whole = random_signs(40, 300, 5)
    assert torch.equal(whole[13:20], random_signs(7, 300, 5, first=13))
    assert not torch.equal(whole, random_signs(40, 300, 6))
    assert abs(float(whole.float().mean())) < 0.03
    assert set(whole.unique().tolist()) == {-1, 1}


@pytest.mark.parametrize("guess", [1, 5, 9])
def test_rank_is_found_from_a_guess_that_is_too_small_or_too_large(guess: int) -> None:
    W = (0.02 * gaussian(*SHAPE, seed=1)).bfloat16()
    delta = 1e-5 * gaussian(SHAPE[0], 5, seed=2) @ gaussian(5, SHAPE[1], seed=3)
    assert Held(W, delta).rank(guess) == 5


def test_of_what_has_no_low_rank_nothing_is_said() -> None:
    W = (0.02 * gaussian(*SHAPE, seed=1)).bfloat16()
    assert Held(W, 2e-5 * gaussian(*SHAPE, seed=2)).rank(1) is None
    U, _, Vh = torch.linalg.svd(gaussian(*SHAPE, seed=4), full_matrices=False)
    falling = 1e-3 * U * torch.arange(1, 257, dtype=torch.float64) ** -0.5 @ Vh
    assert Held(W, falling).rank(12) is None
    assert Held(W, falling).rank(250) is None


class Weighted(Held):
    """One whose rows are seen more or less surely."""

    before: torch.Tensor | None = None

    def score(self, left: torch.Tensor, right: torch.Tensor, variance: float) -> Score:
        self.S, sure = scored(self.D, self.ulp, left @ right.T, variance)
        even = Evening(self.shape[1], 0.1, self.before)
        even.add(sure)
        weights = even.weights()
        assert weights is not None
        self.before = weights.columns
        mean_square = float(self.S.square().mean())
        return Score(Dense(self.S), mean_square, float(sure.mean()), weights)


def test_weights_of_rows_and_columns_and_a_guess_of_factors() -> None:
    """Rows differ by factors of ten; of the large ones less is seen."""
    rows = (0.7 * gaussian(SHAPE[0], seed=7)).exp()
    W = (0.02 * rows[:, None] * gaussian(*SHAPE, seed=1)).bfloat16()
    delta = 1e-4 * gaussian(SHAPE[0], 5, seed=2) @ gaussian(5, SHAPE[1], seed=3)
    seen = Weighted(W, delta)
    noise = float(seen.ulp.double().square().mean()) / 12
    for guess in (3, 5, 8):
        svd = truncated_svd(Dense(seen.D / rows[:, None].float()), guess)
        left = rows[:, None].float() * svd.left * svd.values.float()
        assert explained(seen, svd.right, seen.update, 7, left=left, rest=noise) == 5
