"""How many directions explain a difference of rounded weights, as far as rounding let it through.

Of a weight w that became round(w + δ) not only D = round(w + δ) − w is known, but that δ lies
within half an ulp u of D. With a matrix M of low rank for most of δ, and normal numbers of variance
v for the rest, it is seen with probability P = Φ((D + u/2 − M)/√v) − Φ((D − u/2 − M)/√v), and

    S = ∂ log P / ∂M = (E[δ | D] − M)/v,   h = −∂² log P / ∂M² = (1 − Var[δ | D]/v)/v

say in which direction M explains more, and how sure that is. S has the mean zero where M is all of
δ: it is noise then that has no structure, as D − M has, since rounding errors depend on δ. Where a
weight is small its ulp is, and S hears of δ what in D is drowned by the ulps of large weights: a
value s of δ is seen in S if s √h̄ > (mn)^¼, with h̄ the mean of h (Baik, Ben Arous & Péché, 2005),
and where it is not, in no other function of the elements either (Perry, Wein, Bandeira & Moitra,
2018).

M is found by steps along S, each cut to the rank by a step of subspace iteration, and v by
expectation maximisation (Dempster, Laird & Rubin, 1977). Where rows or columns are seen less surely
than others, as large weights are, the steps are taken with weights under which h is even: the
curvature, and the noise of S, are about the same in all directions. What then stands out of S
becomes further directions of M, until nothing does. Where the noise in S ends is told by S with
random signs, which leave all of it but structure (Hong, Sheng & Dobriban, 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from weft.decompose._orthogonal import gram, orthonormal, whitened
from weft.decompose.even import Weighted, Weights
from weft.decompose.krylov import gaussian

if TYPE_CHECKING:
    from torch import Tensor

    from weft.decompose.matrices import Matrix

_STEPS = 16  # of M and v, for each rank that is tried
_ROUNDS = 8  # ranks that are tried
_ABOVE = 1.12  # times the edge: noise of a finite matrix does not come to it
_CLEAR = 2.0  # times the edge, and the next value, is what leaves no doubt
# Of the shorter side, and in all: of more directions nothing is left to tell the noise by, and
# adapters have no more.
_MOST = 0.4
_MOST_OF_ALL = 512
_FOUND = 32  # directions that are looked for at once
_POWERS = 6  # steps of subspace iteration for them
_LEAST = 1e-4  # of what an element may say
_LEFT = 1e-6  # of the first variance, at least


class Scored(Protocol):
    """The difference, of which a matrix M of low rank is tried."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    def score(self, left: Tensor, right: Tensor, variance: float) -> Score:
        """√v S of M = left @ rightᵀ, in place of the one before."""

    def flip(self, key: int) -> None:
        """Give every element of the last score a random sign; of the same key, take it back."""


@dataclass(frozen=True, slots=True)
class Score:
    """Of all elements.

    Attributes:
        matrix: √v S.
        square: The mean of v S².
        sure: The mean of v h, from 0 (nothing was seen) to 1 (nothing was rounded).
        weights: That make h even; None where it is.
    """

    matrix: Matrix
    square: float
    sure: float
    weights: Weights | None = None

    @property
    def even(self) -> Matrix:
        """`matrix` with even noise, whose variance is h."""
        return self.matrix if self.weights is None else Weighted(self.matrix, self.weights, 0.0)


def scored(D: Tensor, ulp: Tensor, M: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """√v S and v h of each element; see above.

    Args:
        D: The difference.
        ulp: Of the tuned weight. Below a power of two numbers are nearer: the interval is too wide
            there, which is no error, but says less.
        M: What is tried.
        variance: v.
    """
    deviation = math.sqrt(variance)
    away = (D - M).div_(deviation)
    half = (ulp / (2 * deviation)).clamp_(min=_THIN)
    low = away.abs() - half  # the interval is turned to the positive side, where tails are exact
    near = low.clamp(-_END, _FAR)
    high = half.mul_(2).add_(low.clamp(max=_FAR)).clamp_(max=_END)
    at_low, at_high = (torch.exp((x * x).mul_(-0.5)).div_(_ROOT) for x in (near, high))
    inside = torch.erfc(near / _TWO).sub_(torch.erfc(high / _TWO)).div_(2)
    mean = (at_low - at_high).div_(inside)
    sure = near.mul(at_low).sub_(high.mul_(at_high)).div_(inside).neg_().addcmul_(mean, mean)
    return mean.add_(low.sub_(_FAR).clamp_(min=0)).copysign_(away), sure.clamp_(0, 1)


_ROOT, _TWO = math.sqrt(2 * math.pi), math.sqrt(2)
_FAR = 8.0  # deviations: float32 knows the tail there, and S grows by one for each from there on
_END = 11.0  # as good as infinite, and no number below those that are multiplied fast
_THIN = 0.02  # half an interval that float32 knows the ends of; a shorter one says as much


def random_signs(rows: int, columns: int, key: int, first: int = 0) -> Tensor:
    """±1 (rows, columns), each row by its number from `first` on."""
    found = np.empty((rows, columns), np.int8)
    for row in range(rows):
        bits = np.random.Philox(key=key, counter=(0, first + row, 0, 0))
        words = bits.random_raw(-(-columns // 64)).view(np.uint8)
        found[row] = np.unpackbits(words, count=columns)
    return torch.from_numpy(2 * found - 1)


def explained(
    seen: Scored,
    start: Tensor,
    variance: float,
    key: int,
    *,
    left: Tensor | None = None,
    rest: float = math.inf,
) -> int | None:
    """The rank of the update; None where it is not clear, or the update has no low rank.

    Args:
        seen: The difference.
        start: (n, k) directions of its rows, the first guess.
        variance: Of an update of normal numbers that leaves a difference of its size.
        key: Of the random numbers.
        left: (m, k): M = left @ startᵀ is the first guess, and not only its directions.
        rest: The variance of what that leaves of the update, at most.
    """
    most = min(int(_MOST * min(seen.shape)), _MOST_OF_ALL)
    X = start.float()
    if X.shape[1] > most:
        return None
    if left is None:
        left, first = (torch.zeros(size, 1) for size in seen.shape)
    else:
        left, first = left.float(), X
    trial = _tried(seen, left, first, min(variance, rest))
    for number in range(_ROUNDS):
        trial = _fitted(seen, trial, X, variance)
        even, weights = trial.score.even, trial.score.weights
        values, directions = _leading(even, key + number)
        seen.flip(key + number)
        edge = float(_leading(even, key + number)[0][0])
        seen.flip(key + number)
        if not edge:  # there is no noise to compare with
            return None
        more = int((values > _ABOVE * edge).sum())
        if not more:
            return _clear(trial, edge)
        if trial.right.shape[1] + more > most:
            return None
        further = directions[:, :more]
        if weights is not None:
            further = further * weights.columns[:, None]
        X = torch.cat([trial.right, further], 1)
    return None


@dataclass(frozen=True, slots=True)
class _Trial:
    """M = L Rᵀ with its score."""

    left: Tensor
    right: Tensor
    variance: float
    score: Score
    curvature: float  # v h̄ along the last step

    def even(self) -> tuple[Tensor, Tensor]:
        """L and R of diag(1/a) M diag(1/b), whose elements are all seen as surely."""
        weights = self.score.weights
        return (self.left, self.right) if weights is None else weights.back(self.left, self.right)


def _tried(seen: Scored, left: Tensor, right: Tensor, variance: float) -> _Trial:
    score = seen.score(left, right, variance)
    return _Trial(left, right, variance, score, max(score.sure, _LEAST))


def _fitted(seen: Scored, trial: _Trial, X: Tensor, most: float) -> _Trial:
    """The M and v that explain most, of as many directions as X has, from which it starts."""
    for _ in range(_STEPS):
        trial = _step(seen, trial, X, most)
        X = trial.right
    return trial


def _step(seen: Scored, trial: _Trial, X: Tensor, most: float) -> _Trial:
    """M + S/h̄ projected on its image of X; the mean h̄ is that along the step before (a secant).

    In the coordinates in which h is even: one h̄ is near that of every direction.
    """
    v, matrix, weights = trial.variance, trial.score.even, trial.score.weights
    L, R = trial.even()
    X = orthonormal(X if weights is None else X / weights.columns[:, None], (), 0.0)
    scale = math.sqrt(v) / trial.curvature
    Q = orthonormal(L @ (R.T @ X) + scale * matrix.matmul(X), (), 0.0)
    both = torch.cat([Q, L], 1)
    images = matrix.rmatmul(both)
    B = R @ (L.T @ Q) + scale * images[:, : Q.shape[1]]
    moved = torch.cat([B, -R], 1)
    before = float((images.double() * moved).sum()) / math.sqrt(v)
    factor = 1 + trial.score.square - trial.score.sure
    after = min(max(v * factor, _LEFT * most), most)
    length = float((gram(both) * gram(moved)).sum())
    if weights is not None:
        Q, B = weights.of(Q, B)
        both, moved = weights.of(both, moved)
    score = seen.score(Q, B, after)
    along = float((score.matrix.rmatmul(both).double() * moved).sum()) / math.sqrt(after)
    secant = after * (before - along) / length if length else 1.0
    steepest = 1.0 if weights is None else weights.largest**2
    return _Trial(Q, B, after, score, min(max(secant, score.sure / 2, _LEAST), steepest))


def _leading(matrix: Matrix, key: int) -> tuple[Tensor, Tensor]:
    """The largest singular values, falling, and their right vectors, of noise a little less.

    That little is the same with random signs, which they are compared to.
    """
    m, n = matrix.shape
    X = orthonormal(gaussian(n, min(_FOUND, m, n), key, torch.float32), (), 0.0)
    for _ in range(_POWERS):
        X = orthonormal(matrix.rmatmul(whitened(matrix.matmul(X))[0]), (), 0.0)
        if not X.shape[1]:
            return torch.zeros(1, dtype=torch.float64), X
    _, R = whitened(matrix.matmul(X))
    values = R.norm(dim=1)
    return values, X @ (R.T / values).to(X.dtype)


def _clear(trial: _Trial, edge: float) -> int | None:
    """How many values of M are more than noise, if the next is much less.

    Directions of M that are fitted to noise come to about the edge; those of a model tuned in full
    come as near to it as one looks, and where they end is not a matter of this.
    """
    shown = math.sqrt(trial.variance) * edge / max(trial.score.sure, _LEAST)
    L, R = (torch.linalg.qr(each.double())[1] for each in trial.even())
    values = [*(torch.linalg.svdvals(L @ R.T) / shown).tolist(), 1.0]
    rank = int(sum(value > _CLEAR for value in values))
    if rank and values[rank - 1] > 2 * max(values[rank], 1.0):
        return rank
    return None
