"""Which elements of a task vector are kept: by magnitude, at random, or by rank in their row.

Each is a callable (number of the first element, flat values) that sets the others to 0 in place.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from weft import native
from weft.core.errors import Problem
from weft.methods import Parameter, _random, _select

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from torch import Tensor

    from weft.core.specs import Shape
    from weft.methods import Block, Blocks, Task
    from weft.methods._select import Cut, Rank

    Array = np.ndarray[Any, np.dtype[Any]]

PIECE = 2**19  # elements at a time; threads that take turns at smaller pieces get less done


class Keep(Protocol):
    """What is kept of a task vector."""

    def __call__(self, start: int, values: Tensor) -> None:
        """Set to 0 what is not kept of `values` (n,), the elements from `start` on."""


def everything(start: int, values: Tensor) -> None:
    """All are kept."""


def nothing(start: int, values: Tensor) -> None:
    """None is kept."""
    values.zero_()


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """Those with |d| from one bound on and up to another.

    Attributes:
        low: Of what is kept from below, or None.
        high: Of what is kept from above, or None.
        first: At the lower bound itself, the first elements are kept, not the last.
    """

    low: Cut | None
    high: Cut | None = None
    first: bool = True

    def __call__(self, start: int, values: Tensor) -> None:
        import torch

        if self.low and self.low.value > 0:
            for part, before in _sides(start, values, self.low.stop):
                value, equal = self.low.value, before is self.first
                below = _select.below(value, values) if equal else value
                torch.hardshrink(part, below, out=part)
        if self.high and self.high.value < math.inf:
            for part, before in _sides(start, values, self.high.stop):
                kept = part.abs()
                part.mul_(kept.le_(self.high.value) if before else kept.lt_(self.high.value))

    def compiled(self, start: int) -> native.Keep:
        """The bounds of the elements from `start` on, up to a cut's end."""
        low, high = -1.0, math.inf
        if self.low and self.low.value > 0:
            low = self.low.value
            if (start < self.low.stop) is self.first:
                low = _below(low)
        if self.high and self.high.value < math.inf:
            high = self.high.value if start < self.high.stop else _below(self.high.value)
        return native.Keep(low, high)


def _below(value: float) -> float:
    """The next smaller float32."""
    import numpy as np

    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


def _sides(start: int, values: Tensor, stop: int) -> Iterator[tuple[Tensor, bool]]:
    """What of `values` is before element `stop`, and what is not."""
    edge = min(max(stop - start, 0), len(values))
    if edge:
        yield values[:edge], True
    if edge < len(values):
        yield values[edge:], False


@dataclass(frozen=True, slots=True)
class Bernoulli:
    """Each with the same probability, on its own."""

    key: str
    density: float

    def __call__(self, start: int, values: Tensor) -> None:
        for at in range(0, len(values), PIECE):
            part = values[at : at + PIECE]
            part.mul_(_mask(_random.bernoulli(self.key, self.density, start + at, len(part)), part))

    def bits(self, start: int, count: int) -> Array:
        """Packed: which of the elements from `start` on are kept."""
        import numpy as np

        return np.packbits(_random.bernoulli(self.key, self.density, start, count))


@dataclass(frozen=True, slots=True)
class ByRank:
    """Each by the rank of its magnitude: density ± epsilon, the largest likeliest.

    Elements are ranked among those that differ from them in dimension 1 alone: in the row of a
    matrix, in the column of each matrix of a stack. A vector is one row.

    An element of rank r, counted from the smallest of n at 0, is kept if r exceeds the random
    number x = (u − density + ε) (n − 1) / 2ε, u uniform in [0, 1). So only the magnitude at place x
    of the sorted row must be known. Equal elements share the mean of their ranks: of the places
    that x rounds to, it is below the place itself for half.
    """

    key: str
    density: float
    epsilon: float
    count: int
    inner: int = 1

    def __call__(self, start: int, values: Tensor) -> None:
        size = self.count * self.inner
        if not size:
            return
        units = values.view(-1, self.count, self.inner)
        step = max(PIECE // size, 1)
        for at in range(0, len(units), step):
            part = units[at : at + step]
            part.mul_(_mask(self._kept(start + at * size, part.abs()), part))

    def _kept(self, start: int, magnitudes: Tensor) -> Array:
        """Which of (units, count, inner) magnitudes are."""
        import numpy as np

        units, count, inner = magnitudes.shape
        rows = units * inner
        ours: Array = magnitudes.float().cpu().numpy().swapaxes(1, 2).reshape(rows, count)
        # Magnitudes as whole numbers: their bits are in the same order.
        bits = np.full((rows, count + 2), np.iinfo(np.int32).max, np.int32)
        ours.view(np.int32)
        bits[:, 0] = -1
        bits[:, 1:-1] = ours.view(np.int32)
        bits[:, 1:-1].sort(axis=1)
        drawn = _random.uniform32(self.key, start, rows * count).reshape(units, count, inner)
        if count == 1 or not self.epsilon:
            return drawn < self.density * 2**32
        x: Array = drawn.swapaxes(1, 2).reshape(rows, count)
        scale = (count - 1) / (2 * self.epsilon)
        x = np.multiply(x, np.float32(scale * 2**-32), dtype=np.float32, casting="unsafe")
        x -= np.float32((self.density - self.epsilon) * scale)
        place = np.rint(x)
        before = x < place
        at = np.clip(place, -1, count).astype(np.int64)
        at += np.arange(1, rows * (count + 2), count + 2)[:, None]
        kept: Array = ours.view(np.int32) + before > bits.ravel().take(at)
        return np.ascontiguousarray(kept.reshape(units, inner, count).swapaxes(1, 2))


@dataclass(slots=True)
class Recorded:
    """What another has kept, at one bit an element."""

    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    bits: list[Array] = field(default_factory=list)

    def add(self, start: int, count: int, bits: Array) -> None:
        """The elements from `start` on; they follow those that were added before."""
        self.starts.append(start)
        self.counts.append(count)
        self.bits.append(bits)

    def __call__(self, start: int, values: Tensor) -> None:
        import numpy as np

        at, stop = start, start + len(values)
        piece = bisect_right(self.starts, start) - 1
        while at < stop:
            first = at - self.starts[piece]
            last = min(stop - self.starts[piece], self.counts[piece])
            packed = self.bits[piece][first // 8 : -(-last // 8)]
            kept = np.unpackbits(packed)[first % 8 :][: last - first]
            part = values[at - start : at - start + last - first]
            part.mul_(_mask(kept, part))
            at += last - first
            piece += 1


def runs(keeps: Sequence[Keep], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The elements `start` to `stop` in runs in which `compiled` is the same for every keep."""
    edges = {start, stop}
    for keep in keeps:
        if isinstance(keep, Magnitudes):
            edges |= {cut.stop for cut in (keep.low, keep.high) if cut}
        elif isinstance(keep, Recorded):
            edges |= set(keep.starts)
    yield from pairwise(sorted(edge for edge in edges if start <= edge <= stop))


def is_compiled(keep: Keep) -> bool:
    """Whether compiled loops know what is kept."""
    return keep is everything or isinstance(keep, Magnitudes | Recorded | Bernoulli)


def compiled(keep: Keep, start: int, count: int) -> native.Keep:
    """What they are told of `count` elements from `start` on, one of `runs`."""
    match keep:
        case Magnitudes():
            return keep.compiled(start)
        case Recorded():
            piece = bisect_right(keep.starts, start) - 1
            return native.Keep(bits=keep.bits[piece], first=start - keep.starts[piece])
        case Bernoulli():
            return native.Keep(bits=keep.bits(start, count))
    return native.Keep()


def nonzero_bits(values: Tensor) -> Array:
    """Packed: which of `values` (n,) are not 0."""
    import numpy as np

    bits: Array = np.packbits(values.cpu().numpy() != 0)
    return bits


def _mask(kept: Array, like: Tensor) -> Tensor:
    """0 and 1 on the device; NaN · 0 stays NaN, and is found out."""
    import torch

    return torch.from_numpy(kept.view("u1")).to(like.device)


# ------------------------------------------------------------------- of all task vectors of a task

GAMMA = Parameter(
    "share of the largest elements that is dropped", float, 0.01, each=True, low=0, high=1
)
EPSILON = Parameter(
    "how far a probability is from the density, at most", float, 0.15, each=True, low=0
)


def largest(task: Task, blocks: Blocks) -> list[Keep]:
    """Of each the int(density · n) elements of largest |d|, at least one."""

    def ranks(number: int, density: float) -> list[Rank]:
        return [_select.Rank(number, max(1, int(density * task.numel)))]

    densities = task.of_each("density")
    asked = [ranks(n, each) if 0 < each < 1 else [] for n, each in enumerate(densities)]
    found = _by_magnitude(task, blocks, asked)
    return [
        Magnitudes(cuts[0]) if cuts else _all_or_none(density)
        for cuts, density in zip(found, densities, strict=True)
    ]


def without_outliers(task: Task, blocks: Blocks) -> list[Keep]:
    """Of each the int(density · n) elements of largest |d| below the int(gamma · n) largest."""
    count = task.numel
    densities = task.of_each("density")
    asked: list[list[Rank]] = []
    for number, (density, gamma) in enumerate(zip(densities, task.of_each("gamma"), strict=True)):
        target = int(density * count)
        first = max(0, count - target - int(gamma * count))
        ends = [_select.Rank(number, n, largest=False) for n in (first, first + target)]
        asked.append(ends if density < 1 and target > 0 else [])
    found = _by_magnitude(task, blocks, asked)
    return [
        Magnitudes(cuts[0], cuts[1], first=False) if cuts else _all_or_none(math.floor(density))
        for cuts, density in zip(found, densities, strict=True)
    ]


def at_random(task: Task) -> list[Keep]:
    """Of each every element with probability `density`."""
    return [
        Bernoulli(f"{number} {task.key}", density) if 0 < density < 1 else _all_or_none(density)
        for number, density in enumerate(task.of_each("density"))
    ]


def by_rank(task: Task) -> list[Keep]:
    """Of each every element with a probability by its rank (see `ByRank`)."""
    count, inner = _ranked(task.shape)
    return [
        ByRank(f"{number} {task.key}", density, epsilon, count, inner)
        if 0 < density < 1
        else _all_or_none(density)
        for number, (density, epsilon) in enumerate(
            zip(task.of_each("density"), task.of_each("epsilon"), strict=True)
        )
    ]


def ranked_together(shape: Shape) -> int:
    """How many elements that follow each other have all that are ranked with any of them."""
    return math.prod(_ranked(shape))


def _ranked(shape: Shape) -> tuple[int, int]:
    """Elements of a rank's group, and how far they are from each other."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return shape[1], math.prod(shape[2:])


def check_ranks(task: Task) -> Problem | None:
    """Probabilities that are none."""
    for density, epsilon in zip(task.of_each("density"), task.of_each("epsilon"), strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            room = min(density, 1 - density)
            return Problem(
                f"density {density:g} with epsilon {epsilon:g}: density − epsilon and "
                "density + epsilon must lie between 0 and 1",
                f"write an epsilon below {room:g}, such as\nparameters:\n  epsilon: {room / 2:g}",
            )
    return None


def _all_or_none(density: float) -> Keep:
    return everything if density > 0 else nothing


def _by_magnitude(task: Task, blocks: Blocks, ranks: list[list[Rank]]) -> list[list[Cut]]:
    """Cuts of |dᵢ| for the ranks of every input, in one search."""
    flat = [rank for each in ranks for rank in each]
    found = iter(_select.cuts(task.numel, blocks, _magnitude, flat))
    return [[next(found) for _ in each] for each in ranks]


def _magnitude(block: Block, number: int) -> Tensor:
    return block.inputs[number].abs_()
