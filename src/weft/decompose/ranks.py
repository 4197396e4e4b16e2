"""Which rank each module gets, from its singular values: a rule is a function of plain numbers.

Energy is a squared Frobenius norm. `values` are singular values, falling; they may be the first
ones of more, with the energy of all of them known.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def rank_for_energy(values: Sequence[float], energy: float, share: float) -> int | None:
    """The smallest rank that keeps `share` of `energy`; None where `values` do not reach so far.

    Args:
        values: The first singular values.
        energy: Of the whole matrix.
        share: In (0, 1].
    """
    if energy == 0:
        return 0
    kept = 0.0
    for rank, value in enumerate(values, 1):
        kept += value * value
        if kept >= share * energy:
            return rank
    return None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module, for `ranks_for_size`.

    Attributes:
        values: Its first singular values, falling.
        cost: Bytes that each unit of rank takes.
        least: The rank that it gets in any case.
    """

    values: Sequence[float]
    cost: int
    least: int = 0


def ranks_for_size(modules: Sequence[Candidate], budget: int) -> list[int] | None:
    """The ranks with the most energy whose bytes are within `budget`; None where none are.

    The choices of a module are nested, and each further unit of rank brings less than the one
    before; so units are taken by energy per byte. Until the first one that does not fit nothing of
    as many bytes has more energy; the rest is filled in the same order with what fits, and where
    all units cost the same the whole is the best there is.
    """
    ranks = [min(module.least, len(module.values)) for module in modules]
    left = budget - sum(rank * m.cost for rank, m in zip(ranks, modules, strict=True))
    if left < 0:
        return None
    heap: list[tuple[float, int]] = []

    def offer(number: int) -> None:
        module = modules[number]
        if ranks[number] < len(module.values):
            gain = float(module.values[ranks[number]]) ** 2
            if gain > 0:
                heapq.heappush(heap, (-gain / module.cost, number))

    for number in range(len(modules)):
        offer(number)
    while heap:
        _, number = heapq.heappop(heap)
        if modules[number].cost > left:
            continue  # its further units cost as much: smaller modules may still fit
        ranks[number] += 1
        left -= modules[number].cost
        offer(number)
    return ranks
