"""Which rank each module gets, from its singular values: a rule is a function of plain numbers.

Energy is a squared Frobenius norm. `values` are singular values, falling; they may be the first
ones of more, with the energy of all of them known.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Singular values of noise of a finite matrix may stand this far above the edge of an infinite one.
_ABOVE_EDGE = 1.02
# A bulk whose largest value is off the predicted edge by more than this is not the noise predicted.
_FITS = 0.1
_MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23}
_LOWEST = {"bfloat16": -126, "float16": -14, "float32": -126}


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


# ---------------------------------------------------------------------------------- rounding noise


def mean_square_ulp(block: Tensor, dtype: str) -> float:
    """The mean of ulp(w)², for weights stored in `dtype`: ulp = 2^(⌊log₂|w|⌋ − mantissa bits).

    Args:
        block: Weights of any shape, as they are stored or widened.
        dtype: `bfloat16`, `float16` or `float32`. Below its normal numbers the ulp is constant.
    """
    import torch

    # Without sign and mantissa a float32 is 2^⌊log₂|w|⌋; every narrower type is a part of float32.
    powers = (block.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    powers.clamp_min_(2.0 ** _LOWEST[dtype])
    mean = float(powers.double().square_().mean()) if powers.numel() else 0.0
    return mean * 4.0 ** -_MANTISSA[dtype]


@dataclass(frozen=True, slots=True)
class Floor:
    """What rounding to the storage dtype adds to ΔW: independent errors, uniform within an ulp.

    Attributes:
        deviation: σ_n = √(Σ mean(ulp²) / 12) over the sides that were rounded.
        edge: σ_n (√m + √n), where the singular values of such noise end (Bai & Yin, 1993).
        energy: σ_n² m n.
    """

    deviation: float
    edge: float
    energy: float


def noise_floor(shape: tuple[int, int], mean_squares: Sequence[float]) -> Floor:
    """The floor of a matrix of `shape`; `mean_squares` are those of ulp, of each rounded side."""
    deviation = math.sqrt(math.fsum(mean_squares) / 12)
    edge = deviation * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    return Floor(deviation, edge, deviation**2 * shape[0] * shape[1])


@dataclass(frozen=True, slots=True)
class Signal:
    """What stands above the noise.

    Attributes:
        rank: Singular values above the edge.
        bulk: The largest one that does not stand above it; None where no such value is known.
        fits: Whether it is where the noise should end; None where it is not known.
        energy: Of the signal: what those above the edge have, less the noise in them.
        kept: That share of the whole energy less the noise's; 1 where there is none but noise.
    """

    rank: int
    bulk: float | None
    fits: bool | None
    energy: float
    kept: float


def signal(values: Sequence[float], floor: Floor, shape: tuple[int, int], energy: float) -> Signal:
    """Which of `values` stand above `floor`.

    A signal of singular value s appears with s² + σ_n² (m + n) + …: so much is taken off each.

    Args:
        values: The first singular values, at least one below the edge if there is one.
        floor: Of the same matrix.
        shape: Of it.
        energy: ‖ΔW‖².
    """
    rank = sum(value > _ABOVE_EDGE * floor.edge for value in values)
    bulk = values[rank] if rank < len(values) else None
    fits = None
    if bulk is not None and floor.edge:
        fits = abs(bulk / floor.edge - 1) <= _FITS
    spread = floor.deviation**2 * (shape[0] + shape[1])
    found = math.fsum(max(value * value - spread, 0.0) for value in values[:rank])
    whole = energy - floor.energy
    kept = min(found / whole, 1.0) if whole > 0 and found > 0 else float(rank > 0 or whole <= 0)
    return Signal(rank, bulk, fits, found, kept)


# ------------------------------------------------------------------------------------------ budget


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
