"""A matrix of a difference, and the rank of the update in it by what is known of the rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from weft.decompose.even import Weighted, unweighted, weighted
from weft.decompose.krylov import svd_until, truncated_svd
from weft.decompose.noise import signal
from weft.execute._decomposed import clear
from weft.execute._explaining import explained_rank

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from weft.decompose.even import Weights
    from weft.decompose.krylov import Svd
    from weft.decompose.matrices import Dense, Matrix
    from weft.decompose.noise import Noise, Signal
    from weft.execute._differences import Difference, Sums
    from weft.execute._streamed import Streamed

START = 32  # the rank that is tried first, where it depends on the values
# Directions of a guess of which all but the first may be what rounding made of that one.
_FEW = 16


def update_of(
    source: Difference,
    start: int,
    matrix: Dense | Streamed,
    values: Tensor | None,
    sums: Sums,
    weights: Weights | None,
    key: int,
) -> tuple[Svd, Signal]:
    """What is the update's own of a difference, and what is known of it.

    Where all weights are rounded alike (`Noise.is_uniform`), the matrix is made even and decomposed
    so: large rows' noise would be taken before the update's smaller values otherwise, and these be
    lost. The SVD that is returned has the weights taken back: its error is more than the least that
    a matrix of its rank has. Where large ulps hide what they round there is no such noise, and
    the even matrix only gives the first guess of what explains it.

    Args:
        source: The tensor.
        start: The matrix's first row.
        matrix: Of the difference.
        values: Of the matrix, where they are held.
        sums: Of the matrix.
        weights: That make uniform noise even, where they are known.
        key: Of the random numbers.
    """
    noise = sums.noise
    even: Weighted | None = None
    if weights is not None and not noise.is_hidden:
        even = weighted(matrix, weights)
    # Of uniform noise alone it is known how the sizes of weights spread it.
    taken = noise if even is None else replace(noise, variance=noise.uniform)
    svd, above = _standing(even or matrix, taken, key)
    rank = _explained(source, start, values, sums, svd.cut(max(above.rank, 1)), even, key)
    if even is not None and not noise.is_uniform:
        even, taken = None, noise
        if rank is None:
            return _standing(matrix, noise, key)
        svd = truncated_svd(matrix, rank + 1, key=key)
    if rank is not None:
        if rank >= svd.rank:
            svd = truncated_svd(even or matrix, rank + 1, key=key)
        above = _signal(svd, replace(taken, rank=rank), matrix.shape)
    return (svd if even is None else unweighted(svd.cut(above.rank), even)), above


def _explained(
    source: Difference,
    start: int,
    values: Tensor | None,
    sums: Sums,
    guess: Svd,
    even: Weighted | None,
    key: int,
) -> int | None:
    """The rank that explains the difference, found from what stands out of it."""
    left, right = guess.left * guess.values.to(guess.left), guess.right
    if even is not None:
        left, right = even.weights.back(left, right)
    rank = explained_rank(source, start, values, sums, (left, right), key)
    if rank is None and 1 < guess.rank <= _FEW:
        return explained_rank(source, start, values, sums, (left[:, :1], right[:, :1]), key)
    return rank


def _standing(matrix: Matrix, noise: Noise, key: int) -> tuple[Svd, Signal]:
    """What stands above the noise, and one value more."""
    svd = svd_until(matrix, _enough(noise, matrix.shape), start=START, key=key)
    return svd, _signal(svd, noise, matrix.shape)


def _signal(svd: Svd, noise: Noise, shape: tuple[int, int]) -> Signal:
    return signal(clear(svd.values.tolist()), noise, shape, svd.energy)


def _enough(noise: Noise, shape: tuple[int, int]) -> Callable[[Svd], int | None]:
    """What `svd_until` asks: one value more than are the update's own has to be seen."""
    tried = START // 2

    def enough(found: Svd) -> int | None:
        nonlocal tried
        tried *= 2
        values = clear(found.values.tolist())
        if len(values) < min(tried, *shape):
            return len(values)  # there is no more
        above = signal(values, noise, shape, found.energy)
        return above.rank + 1 if above.known else None

    return enough
