"""Rules that choose ranks, against exhaustive search and simulated rounding."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.decompose.ranks import (
    Candidate,
    mean_square_ulp,
    noise_floor,
    rank_for_energy,
    ranks_for_size,
    signal,
)


@given(values=st.lists(st.floats(0.01, 10), min_size=1, max_size=12), share=st.floats(0.01, 0.9999))
def test_energy_gives_the_smallest_rank_that_keeps_it(values: list[float], share: float) -> None:
    values = sorted(values, reverse=True)
    energy = sum(v * v for v in values) * (1 + 1e-12)
    rank = rank_for_energy(values, energy, share)
    assert rank is not None
    assert sum(v * v for v in values[:rank]) >= share * energy * (1 - 1e-9)
    assert sum(v * v for v in values[: rank - 1]) < share * energy


def test_energy_beyond_the_known_values_is_not_answered() -> None:
    assert rank_for_energy([2.0, 1.0], 10.0, 0.4) == 1
    assert rank_for_energy([2.0, 1.0], 10.0, 0.6) is None
    assert rank_for_energy([], 0.0, 0.9) == 0


def test_ulp_is_the_distance_to_the_next_number() -> None:
    """Against numpy's `spacing`, and for bfloat16 against the bits."""
    numbers = np.random.default_rng(0)
    half = (numbers.standard_normal(4000) * 10.0 ** numbers.integers(-9, 4, 4000)).astype(
        np.float16
    )
    half[:3] = (0, 2**-14, -(2**-20))
    expected = np.mean(np.abs(np.spacing(np.abs(half))).astype(np.float64) ** 2)
    assert mean_square_ulp(torch.from_numpy(half), "float16") == pytest.approx(expected)
    single = half.astype(np.float32) * np.float32(1.37)
    expected = np.mean(np.spacing(np.abs(single)).astype(np.float64) ** 2)
    found = mean_square_ulp(torch.from_numpy(single), "float32")
    assert found == pytest.approx(expected, rel=1e-6)
    brain = torch.from_numpy(single).bfloat16()
    after = (brain.abs().view(torch.int16) + 1).view(torch.bfloat16).double()
    expected = float((after - brain.abs().double()).square().mean())
    assert mean_square_ulp(brain, "bfloat16") == pytest.approx(expected)
    assert mean_square_ulp(brain.float(), "bfloat16") == pytest.approx(expected)
    assert mean_square_ulp(torch.zeros(0), "bfloat16") == 0


@pytest.mark.parametrize(("dtype", "rank"), [("bfloat16", 16), ("float16", 12), ("bfloat16", 0)])
def test_signal_of_a_merged_adapter_is_its_rank(dtype: str, rank: int) -> None:
    numbers = np.random.default_rng(rank)
    shape = (512, 384)
    W = torch.from_numpy(0.02 * numbers.standard_normal(shape)).to(getattr(torch, dtype))
    delta = numbers.standard_normal((shape[0], rank)) @ numbers.standard_normal((rank, shape[1]))
    exact = W.double() + 3e-4 * torch.from_numpy(delta)
    if not rank:  # rounded all the same: a model that was stored in float32 between
        exact += 1e-4 * torch.from_numpy(numbers.standard_normal(shape))
    tuned = exact.to(getattr(torch, dtype))
    noise = (tuned.double() - exact).square().sum()
    floor = noise_floor(shape, [mean_square_ulp(tuned, dtype)])
    assert floor.energy == pytest.approx(float(noise), rel=0.06)
    if not rank:
        return
    difference = tuned.double() - W.double()
    values = torch.linalg.svdvals(difference).tolist()
    found = signal(values, floor, shape, float(difference.square().sum()))
    assert found.rank == rank
    assert found.fits is True
    true = float((3e-4 * torch.from_numpy(delta)).square().sum())
    assert found.energy == pytest.approx(true, rel=0.01)
    assert found.kept == pytest.approx(1, abs=0.01)


def test_a_bulk_that_is_not_rounding_is_said_to_be_none() -> None:
    floor = noise_floor((512, 384), [12e-6])
    assert floor.deviation == pytest.approx(1e-3)
    assert floor.edge == pytest.approx(1e-3 * (math.sqrt(512) + math.sqrt(384)))
    low = [9 * floor.edge, 0.5 * floor.edge]
    assert signal(low, floor, (512, 384), 1.0).fits is False
    assert signal([9 * floor.edge], floor, (512, 384), 1.0).fits is None
    assert signal([0.99 * floor.edge], floor, (512, 384), 1.0).fits is True
    nothing = noise_floor((512, 384), [])
    assert signal([1.0, 0.5], nothing, (512, 384), 1.25).kept == pytest.approx(1)


@settings(max_examples=60)
@given(
    modules=st.lists(
        st.tuples(
            st.lists(st.integers(1, 9), min_size=0, max_size=4),
            st.integers(1, 5),
            st.integers(0, 1),
        ),
        min_size=1,
        max_size=4,
    ),
    budget=st.integers(0, 40),
    same=st.booleans(),
)
def test_size_is_honoured_and_best(
    modules: list[tuple[list[int], int, int]], budget: int, same: bool
) -> None:
    given_ = [
        Candidate([float(v) for v in sorted(values, reverse=True)], 3 if same else cost, least)
        for values, cost, least in modules
    ]

    def size(ranks: list[int]) -> int:
        return sum(rank * m.cost for rank, m in zip(ranks, given_, strict=True))

    def energy(ranks: list[int]) -> float:
        return sum(
            sum(v * v for v in m.values[:rank]) for rank, m in zip(ranks, given_, strict=True)
        )

    every = [
        list(ranks)
        for ranks in itertools.product(
            *(range(min(m.least, len(m.values)), len(m.values) + 1) for m in given_)
        )
    ]
    allowed = [ranks for ranks in every if size(ranks) <= budget]
    found = ranks_for_size(given_, budget)
    if not allowed:
        assert found is None
        return
    assert found in allowed
    best = max(map(energy, allowed))
    largest = max((m.values[0] ** 2 for m in given_ if m.values), default=0)
    assert energy(found) >= best - largest
    if same:
        assert energy(found) == best
    # Nothing that is left out would still have fitted.
    for number, module in enumerate(given_):
        if found[number] < len(module.values):
            assert size(found) + module.cost > budget
