"""Sums of products: no float32 between the runs, and without a word where they overflow."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from weft.core.sums import RUN, dot
from weft.execute._squares import squares


@pytest.mark.parametrize("count", [0, 1, RUN - 1, RUN, 3 * RUN + 5])
def test_sum_is_that_of_float64(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, generator=generator) for _ in range(2))
    terms = (x.double() * y.double()).tolist()
    rounding = 1e-6 * math.fsum(abs(term) for term in terms)
    assert dot(x, y) == pytest.approx(math.fsum(terms), abs=rounding)


def test_runs_are_added_in_float64() -> None:
    """Numbers whose runs are exact in float32, in any order, and whose sum no float32 is."""
    x, y = torch.ones(5 * RUN + 1), torch.full((5 * RUN + 1,), 1000.0)
    y[-1] = 1
    exact = 5 * RUN * 1000 + 1
    assert RUN * 1000 < 2**24 < exact
    assert dot(x, y) == exact
    assert exact not in (float(x @ y), float((x * y).sum()))


@pytest.mark.parametrize("count", [5, RUN + 5])
def test_overflow_is_infinite_and_no_warning(count: int) -> None:
    mixed = torch.zeros(count)
    mixed[::2] = math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dot(torch.full((count,), 1e20), torch.full((count,), 1e20)) == math.inf
        assert math.isnan(dot(mixed, mixed.roll(1)))


@pytest.mark.parametrize("value", [1e20, 1e-25, 3e-45, 0.0])
def test_squares_of_any_float32_are_finite_and_right(value: float) -> None:
    x = torch.full((3, RUN + 1), value)
    exact = float(x.double()[0, 0]) ** 2 * x.numel()
    assert squares(x) == pytest.approx(exact, rel=1e-6)
