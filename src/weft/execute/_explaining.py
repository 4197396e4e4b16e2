"""The rank that explains a difference of rounded weights, whose elements are read and scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.sums import dot
from weft.decompose.even import Evening
from weft.decompose.explained import Score, explained, random_signs, scored
from weft.decompose.matrices import Dense
from weft.decompose.noise import ulp_of
from weft.execute._streamed import Streamed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from weft.execute._differences import Difference, Sums

# Of an update of more ulps what is rounded off is noise without structure, and hides little.
_ULPS = 16


def explained_rank(
    source: Difference,
    start: int,
    values: Tensor | None,
    sums: Sums,
    guess: tuple[Tensor, Tensor],
    key: int,
) -> int | None:
    """The rank of a matrix of the difference; None where nothing says that it has a low one.

    Args:
        source: The tensor.
        start: The matrix's first row.
        values: The matrix as it is read, in whose place there are scores meanwhile; None for one
            that is too large to be held.
        sums: Of the matrix.
        guess: The factors of what is taken to be the update, (m, k) and (n, k).
        key: Of the random numbers.
    """
    noise, shape = sums.noise, (len(guess[0]), len(guess[1]))
    if sums.grid is None or not 0 < noise.update < _ULPS**2 * 12 * noise.uniform:
        return None
    seen = _Seen(source, start, shape, sums.grid, values)
    left, right = guess
    rank = explained(seen, right, noise.update, key, left=left, rest=noise.uniform)
    if values is not None:
        for _ in source.blocks(start, seen.stop, values):
            pass
    return rank


@dataclass(slots=True)
class _Seen:
    """What `explained` asks of the matrix of `shape` that begins with row `first`."""

    source: Difference
    first: int
    shape: tuple[int, int]
    grid: str
    values: Tensor | None
    tried: tuple[Tensor, Tensor, float] | None = None
    key: int | None = None  # of the signs, of scores that are not held
    evened: Tensor | None = None  # the weights of columns

    @property
    def columns(self) -> int:
        return self.source.columns

    @property
    def stop(self) -> int:
        return self.first + self.shape[0] * self.shape[1] // self.columns

    def score(self, left: Tensor, right: Tensor, variance: float) -> Score:
        self.tried, self.key = (left, right, variance), None
        square, sure = 0.0, 0.0
        even = Evening(self.columns, _LEAST, self.evened)
        for first, S, h in self._scored(self.first, self.stop):
            square += dot(S, S)
            sure += float(h.double().sum())
            even.add(h)
            if self.values is not None:
                self.values[first - self.first :][: len(S)] = S
        count = self.shape[0] * self.shape[1]
        matrix: Dense | Streamed
        if self.values is None:
            matrix = Streamed(self, self.first, self.stop, square)
        else:
            matrix = Dense(self.values.view(self.shape), square)
        # A kernel is read by other rows than it has.
        weights = even.weights() if self.columns == self.shape[1] else None
        self.evened = None if weights is None else weights.columns
        return Score(matrix, square / count, sure / count, weights)

    def flip(self, key: int) -> None:
        if self.values is None:
            self.key = None if self.key == key else key
            return
        for row in range(0, len(self.values), _ROWS):
            some = self.values[row : row + _ROWS]
            some *= self._signs(row, len(some), key).to(some.device)

    def blocks(
        self, start: int, stop: int, into: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Of the scores, as `Difference.blocks` has those of the difference."""
        for first, S, _ in self._scored(start, stop):
            if self.key is not None:
                S *= self._signs(first - self.first, len(S), self.key).to(S.device)
            yield first, S, None

    def _scored(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        assert self.tried is not None
        variance = self.tried[2]
        step = max(1, _ELEMENTS // self.columns)
        for first, delta, base in self.source.blocks(start, stop):
            assert base is not None
            base.add_(delta)
            for row in range(0, len(delta), step):
                D, tuned, at = delta[row : row + step], base[row : row + step], first + row
                tried = self._tried((at - self.first) * self.columns, D.numel())
                M = tried.to(D).view_as(D)
                yield at, *scored(D, ulp_of(tuned, self.grid), M, variance)

    def _tried(self, begin: int, count: int) -> Tensor:
        """Elements of left @ rightᵀ from `begin` on: a kernel is read by other rows than it has."""
        assert self.tried is not None
        left, right, _ = self.tried
        columns = self.shape[1]
        row, end = begin // columns, -(-(begin + count) // columns)
        return (left[row:end] @ right.T).view(-1)[begin - row * columns :][:count]

    def _signs(self, first: int, count: int, key: int) -> Tensor:
        return random_signs(count, self.columns, key, first)


_ROWS = 1024  # that have their signs at once
_LEAST = 0.1  # of the mean of h: what was not seen of rows so far may be seen in the next step
_ELEMENTS = 2**16  # that are scored at once: what lies in the cache is scored three times as fast
