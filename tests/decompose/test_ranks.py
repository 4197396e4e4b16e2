"""Rules that choose ranks, against exhaustive search."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from weft.decompose.ranks import (
    Candidate,
    rank_for_energy,
    ranks_for_size,
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
