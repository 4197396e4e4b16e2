"""The k-th largest of all elements of a tensor: exact, without a sort, in bounded memory.

A sample says between which two values it lies, one pass over the blocks counts what is above them
and collects what is between, and the answer is found there. Should the sample have been wrong, the
pass has taken a better one on its way, and it is done again with more room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from weft import native

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from torch import Tensor

    from weft.methods import Block, Blocks

    Array = np.ndarray[Any, np.dtype[Any]]
    Key = Callable[[Block, int], Tensor]

WHOLE = 2**20  # elements of a tensor that is looked at as a whole
STRIDE = 128  # of the elements that a pass keeps as the next sample
CROWD = 64  # if more than one in so many is between the bounds, equal ones may be counted
ROOM = 0.002  # of all elements, the least that a bound is away from where it is thought to be
PARTS = 8  # of a piece of the sample, see `_Search.bound`


class Rank(NamedTuple):
    """The `size` largest elements by key number `key`, or the smallest."""

    key: int
    size: int
    largest: bool = True


class Cut(NamedTuple):
    """Which elements a rank takes: those beyond `value`, and those equal to it before `stop`."""

    value: float
    stop: int


def cuts(
    numel: int, blocks: Blocks, key: Key, ranks: Sequence[Rank], *, ties: bool = True
) -> list[Cut]:
    """Where each of `ranks` ends.

    Equal elements are taken in their order, as a stable sort does; but elements whose key is 0 are
    not told apart.

    Args:
        numel: Elements of the tensor.
        blocks: Of the tensor.
        key: (block, number of the key) -> what the elements are ranked by, none negative.
        ranks: What is looked for.
        ties: Without them only the values count, and every `stop` is the end.
    """
    found = [Cut(math.inf if rank.largest else -math.inf, 0) for rank in ranks]
    searches = []
    for number, rank in enumerate(ranks):
        if rank.size >= numel:
            found[number] = Cut(-math.inf if rank.largest else math.inf, 0)
        elif rank.size > 0:
            place = rank.size if rank.largest else numel - rank.size + 1
            searches.append(_Search(number, rank, place / numel, place))
    if searches and numel > WHOLE:
        sample = min(max(numel // 256, 2**16), 2**18)
        _bound(searches, blocks.map(lambda block: _thin(block, searches, key, 1), sample))
    left = searches
    while left:
        passes = blocks.map(lambda block: _count(block, left, key))  # noqa: B023  (called at once)
        for at, search in enumerate(left):
            search.look([found[at] for found, _ in passes], numel)
        left = [search for search in left if search.value is None]
        _bound(left, [thin for _, thin in passes])
    stops = _stops(searches, blocks, key) if ties else {}
    for search in searches:
        found[search.number] = Cut(search.value or 0.0, stops.get(search.number, numel))
    return found


class _Between(NamedTuple):
    """Of a block: how many keys are above the bounds, and those that are between them.

    Attributes:
        counts: How often each of `values` occurs; None if they are as they come.
    """

    above: int
    values: Array
    counts: Array | None


@dataclass(slots=True)
class _Search:
    """One rank being looked for: the element at `place`, counted from the largest.

    Attributes:
        share: `place` as a share of all elements.
        low, high: Bounds of the pass, both included.
        least, most: What is known for certain.
        room: How much wider the bounds are than the sample suggests.
        ties: How many are taken of those equal to `value`, if not all.
        counts: Of these, in every block.
    """

    number: int
    rank: Rank
    share: float
    place: int
    low: float = 0.0
    high: float = math.inf
    least: float = 0.0
    most: float = math.inf
    room: int = 1
    value: float | None = None
    ties: int | None = None
    counts: list[int] = field(default_factory=list)

    def bound(self, sample: Array, pieces: Sequence[Array]) -> None:
        """Set the bounds by a sorted sample, which comes in pieces that may differ as a whole."""
        import numpy as np

        def value(share: float) -> float:
            return float(sample[len(sample) - 1 - int(share * len(sample))])

        # Neighbours are alike, so that pieces tell best how far off a sample may be; but few of
        # them may be alike by chance, which their parts are not.
        guess = value(self.share)
        parts = [part for piece in pieces for part in np.array_split(piece, PARTS) if len(part)]
        error = max(_error(pieces, guess), _error(parts, guess))
        room = self.room * max(4 * error, ROOM)
        self.low = value(self.share + room) if self.share + room < 1 else 0.0
        self.high = value(self.share - room) if self.share > room else math.inf
        self.low, self.high = max(self.low, self.least), min(self.high, self.most)
        if self.low > self.high or self.room > 16:
            self.low, self.high = self.least, self.most
        self.room *= 4

    def look(self, found: Sequence[_Between], numel: int) -> None:
        """Find the value among those between the bounds, or know at least where it is not."""
        over = sum(each.above for each in found)
        inside = sum(len(values) if n is None else int(n.sum()) for _, values, n in found)
        if self.place <= over:
            self.least = self.high
        elif self.place > over + inside:
            self.most = self.low
            self.value = 0.0 if self.low <= self.least else None
        else:
            value, larger, equal = _kth(found, self.place - over)
            self.value = float(value)
            first = over + larger  # elements above it
            taken = self.rank.size - (first if self.rank.largest else numel - first - equal)
            if taken < equal:
                self.ties = taken
                equals = [(values == value, counts) for _, values, counts in found]
                self.counts = [int((e if n is None else n[e]).sum()) for e, n in equals]


def _error(pieces: Sequence[Array], value: float) -> float:
    """The standard error of the share that is above `value`, by how the pieces differ in it."""
    import numpy as np

    shares = [float(np.mean(piece >= value)) for piece in pieces]
    return float(np.std(shares, ddof=1)) / math.sqrt(len(shares)) if len(shares) > 1 else 1.0


def below(value: float, like: Tensor) -> float:
    """The next smaller number of the dtype."""
    import torch

    at = torch.tensor([value, -math.inf], dtype=like.dtype)
    return float(torch.nextafter(at[0], at[1]))


def _array(values: Tensor) -> Array:
    array: Array = values.reshape(-1).cpu().numpy()
    return array


def _numbers(searches: Sequence[_Search]) -> list[int]:
    """The keys that are needed."""
    return list(dict.fromkeys(search.rank.key for search in searches))


def _thin(block: Block, searches: Sequence[_Search], key: Key, stride: int) -> dict[int, Array]:
    """Every `stride`-th key."""
    return {n: _array(key(block, n))[::stride].copy() for n in _numbers(searches)}


def _count(
    block: Block, searches: Sequence[_Search], key: Key
) -> tuple[list[_Between], dict[int, Array]]:
    """What is above and between the bounds of each search, and a thin sample of the keys."""
    found: dict[int, _Between] = {}
    thin = {}
    for number in _numbers(searches):
        keys = _array(key(block, number))
        thin[number] = keys[::STRIDE].copy()
        for search in searches:
            if search.rank.key == number:
                found[search.number] = _between(keys, search.low, search.high)
    return [found[search.number] for search in searches], thin


def _between(keys: Array, low: float, high: float) -> _Between:
    import numpy as np

    # Of zeros there may be very many, and they need not be told apart.
    least = max(low, float(np.finfo(keys.dtype).smallest_subnormal))
    if native.library() is not None and keys.dtype == np.float32:
        room = np.empty_like(keys)
        inside, count = native.between(keys, least, high, room)
        values = room[:inside].copy()
    else:
        larger = keys > keys.dtype.type(high)
        count, values = int(np.count_nonzero(larger)), keys[(keys >= least) & ~larger]
    if high == math.inf and low == 0:
        return _Between(0, values, None)
    if len(values) * CROWD > len(keys):
        # Differences of bfloat16 have few values; what has none alike is not worth the sorting.
        different, counts = np.unique(values, return_counts=True)
        if 2 * len(different) <= len(values):
            return _Between(count, different, counts)
    return _Between(count, values, None)


def _kth(found: Sequence[_Between], place: int) -> tuple[float, int, int]:
    """-> the value at `place` from above, how many are larger, and how many equal."""
    import numpy as np

    if all(counts is None for _, _, counts in found):
        values = np.concatenate([values for _, values, _ in found])
        at = len(values) - place
        value = np.partition(values, at)[at]
        return value, int(np.count_nonzero(values > value)), int(np.count_nonzero(values == value))
    parts = [
        np.unique(values, return_counts=True) if counts is None else (values, counts)
        for _, values, counts in found
    ]
    values = np.concatenate([values for values, _ in parts])
    counts = np.concatenate([counts for _, counts in parts])
    order = np.argsort(-values, kind="stable")
    value = values[order][np.searchsorted(np.cumsum(counts[order]), place)]
    return value, int(counts[values > value].sum()), int(counts[values == value].sum())


def _bound(searches: Sequence[_Search], samples: Sequence[dict[int, Array]]) -> None:
    """Set the bounds of the next pass."""
    import numpy as np

    for number in _numbers(searches):
        pieces = [sample[number] for sample in samples if len(sample[number])]
        together = np.sort(np.concatenate(pieces))
        for search in searches:
            if search.rank.key == number:
                search.bound(together, pieces)


def _stops(searches: Sequence[_Search], blocks: Blocks, key: Key) -> dict[int, int]:
    """Where the last of the ties is that a rank takes, for those that do not take all of them."""
    import numpy as np

    inside: dict[int, list[tuple[_Search, int]]] = {}
    for search in searches:
        if search.ties is not None:
            left = search.ties
            block = 0
            while left > search.counts[block]:
                left -= search.counts[block]
                block += 1
            inside.setdefault(block, []).append((search, left))

    def stops(block: Block, wanted: list[tuple[_Search, int]]) -> dict[int, int]:
        found = {}
        for number in _numbers([search for search, _ in wanted]):
            keys = _array(key(block, number))
            for search, count in wanted:
                if search.rank.key == number and count:
                    at = np.flatnonzero(keys == keys.dtype.type(search.value))
                    found[search.number] = block.start + int(at[count - 1]) + 1
                elif search.rank.key == number:
                    found[search.number] = 0
        return found

    found: dict[int, int] = {}
    for block, wanted in inside.items():
        for each in blocks.map(lambda block, wanted=wanted: stops(block, wanted), only={block}):  # type: ignore[misc]
            found |= each
    return found
