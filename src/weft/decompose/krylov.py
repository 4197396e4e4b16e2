"""The truncated singular value decomposition of a matrix that is only multiplied.

Randomised block Krylov iteration (Musco & Musco, arXiv:1504.05477; Tropp & Webber,
arXiv:2306.12418), with the short side of A as the space of the basis X:

    X₀ = orth(Ω),  Yⱼ = A Xⱼ,  Xⱼ₊₁ = orth(Aᵀ orth(Yⱼ)) against all blocks before,

and what is kept of A is A X Xᵀ = Y Xᵀ, whose SVD comes from the small YᵀY, in float64. Since the
rest A − Y Xᵀ is orthogonal to it, ‖A − U Σ Vᵀ‖² = ‖A‖² − Σ σ̂² is the true error, not an estimate.

The iteration goes on until the geometric decrease of what each block still adds says that the error
is within `tolerance` of the optimum, and then until `_certificate` proves it; after a few tries it
gives up the proof, not the result. `Svd.bound` is what was proved.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from weft.decompose import _exact
from weft.decompose._certificate import Basis, Bordered, Probes, free_bound, probed_bound, probes
from weft.decompose._orthogonal import bordered, gram, orthonormal, whitened
from weft.decompose._rough import directions
from weft.decompose._series import to_come
from weft.decompose.matrices import Resized, Turned, residual

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from weft.decompose.matrices import Matrix

TOLERANCE = 1.002
_OVERSAMPLING = 8
_LANES = 16  # a product of 48 columns takes no longer than one of 40
# A proof that fails costs more than the block that makes it succeed.
_CERTAIN = 0.3
_MOST_BLOCKS = 12
_MOST_PROOFS = 3  # a further block, where one fails, is cheaper than a fourth
# Below this share of ‖A‖² a difference of two energies is rounding: of float32 products here.
_CANCELS = 1e-2
# Singular values of this share of the largest are what float32 made of zero.
_NOISE = 3e-7
# log₂ ‖A‖ of which float32 holds A, AᵀA and what is left of them, with much to spare.
_PLAIN = 40
# A share of ‖A‖² that float32 products of A tell for sure.
_TOLD = 1e-6
# ‖A − BA‖ / ‖A‖ that float32 cannot tell from none.
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Svd:
    """A ≈ U Σ Vᵀ of some rank k.

    Attributes:
        left: U (m, k).
        values: Σ (k), float64, falling.
        right: V (n, k).
        energy: ‖A‖².
        error: ‖A − U Σ Vᵀ‖².
        excess: (k) what Σ σᵢ² over the first i of the true singular values may have more than
            `values` has, at most; zeros where the factorisation is exact.
        exact: Made by a full factorisation.
        products: Columns that A or Aᵀ was multiplied with.
    """

    left: Tensor = field(repr=False)
    values: Tensor
    right: Tensor = field(repr=False)
    energy: float
    error: float
    excess: Tensor = field(repr=False)
    exact: bool = False
    products: int = 0

    @property
    def rank(self) -> int:
        return self.values.shape[0]

    @property
    def relative_error(self) -> float:
        """‖A − U Σ Vᵀ‖ / ‖A‖; 0 of a matrix of zeros."""
        return math.sqrt(self.error / self.energy) if self.energy else 0.0

    @property
    def kept(self) -> float:
        """The share of ‖A‖² that is in U Σ Vᵀ; 1 of a matrix of zeros."""
        return 1 - self.error / self.energy if self.energy else 1.0

    @property
    def bound(self) -> float:
        """How many times the error of the best matrix of this rank the error is, at most.

        1 where the error is below what float32 can tell; infinite where nothing is proved.
        """
        excess = float(self.excess[-1]) if self.rank else 0.0
        return times_the_best(self.error, excess, self.energy)

    def cut(self, rank: int) -> Svd:
        """The same, to a smaller rank: what is left out is orthogonal to the rest."""
        if rank >= self.rank:
            return self
        return replace(
            self,
            left=self.left[:, :rank],
            values=self.values[:rank],
            right=self.right[:, :rank],
            error=self.error + float(self.values[rank:].square().sum()),
            excess=self.excess[:rank],
        )

    def times(self, factor: float, energy: float) -> Svd:
        """Of factor · A, whose ‖·‖² is `energy`."""
        return replace(
            self,
            values=self.values * factor,
            energy=energy,
            error=self.error * factor**2,
            excess=self.excess * factor**2,
        )


def times_the_best(error: float, excess: float, energy: float) -> float:
    """√(error / the least error), at most, of an A with ‖A‖² = `energy`; infinite without proof.

    Args:
        error: ‖A − U Σ Vᵀ‖².
        excess: What the best of this rank may keep of ‖A‖² beyond U Σ Vᵀ; 0 if this is the best.
        energy: ‖A‖².
    """
    if not excess or error <= ROUNDING**2 * energy:
        return 1.0
    # The error itself is known to no more than what float32 tells.
    best = (math.sqrt(error) - ROUNDING * math.sqrt(energy)) ** 2 - excess
    return math.sqrt(error / best) if best > 0 else math.inf


def key_of(seed: int, name: str) -> int:
    """The number that a module's random vectors are drawn by: of nothing but seed and name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16])


def truncated_svd(
    matrix: Matrix,
    rank: int,
    *,
    key: int = 0,
    tolerance: float = TOLERANCE,
    proof: float | None = None,
) -> Svd:
    """The SVD of `matrix` to `rank`, its error within `tolerance` of the best.

    The same `key` gives the same bits, whatever other threads do.

    Args:
        matrix: (m, n), finite.
        rank: At most min(m, n) is used; the result has less where A has less.
        key: Of the random numbers; see `key_of`.
        tolerance: Of ‖A − U Σ Vᵀ‖ against that of the full factorisation, cut.
        proof: What `bound` is to be brought to, where it can; None for the tolerance itself. In
            the flat spectrum of noise a proof of 1.005 costs half of one of 1.002.
    """
    rows, columns = matrix.shape
    rank = min(rank, rows, columns)
    if not matrix.energy or not rank:
        zero = torch.zeros(rank, dtype=torch.float64)
        return Svd(
            torch.zeros(rows, rank), zero, torch.zeros(columns, rank), matrix.energy,
            matrix.energy, zero, exact=not matrix.energy,
        )  # fmt: skip
    power = round(math.log2(matrix.energy) / 2)
    if abs(power) > _PLAIN:
        unit = Resized(matrix, 2.0**-power)
        found = truncated_svd(unit, rank, key=key, tolerance=tolerance, proof=proof)
        return found.times(2.0**power, matrix.energy)
    if _exact.cheaper(rows, columns, rank):
        left, values, right = _exact.svd(matrix, rank)
        return _finished(matrix, Svd(left, values, right, matrix.energy, 0.0, values * 0, True))
    if rows < columns:
        found = _Iteration(Turned(matrix), rank, key, tolerance, proof or tolerance).run()
        found = replace(found, left=found.right, right=found.left)
    else:
        found = _Iteration(matrix, rank, key, tolerance, proof or tolerance).run()
    return _finished(matrix, found)


def svd_until(
    matrix: Matrix,
    enough: Callable[[Svd], int | None],
    *,
    start: int = 32,
    key: int = 0,
    tolerance: float = TOLERANCE,
) -> Svd:
    """The SVD to the rank that `enough` names; asked again with twice the rank while it is None.

    Args:
        matrix: (m, n), finite.
        enough: Takes an SVD, of full rank at last, and says to which rank it is to be cut.
        start: The first rank that is tried.
        key: Of the random numbers.
        tolerance: As in `truncated_svd`.
    """
    full = min(matrix.shape)
    rank = min(start, full)
    while True:
        found = truncated_svd(matrix, rank, key=key, tolerance=tolerance)
        wanted = enough(found)
        if wanted is not None or rank == full:
            return found.cut(found.rank if wanted is None else wanted)
        rank = min(2 * rank, full)


def _finished(matrix: Matrix, found: Svd) -> Svd:
    """With its error, which is taken entry by entry where the difference would be rounding.

    Singular values that are rounding of the largest are left out.
    """
    found = found.cut(int((found.values > _NOISE * found.values[0]).sum()))
    error = found.energy - float(found.values.square().sum())
    if error < _CANCELS * found.energy:
        error = residual(matrix, found.left * found.values.to(found.left.dtype), found.right)
    return replace(found, error=error)


def gaussian(count: int, columns: int, key: int, dtype: torch.dtype) -> Tensor:
    """(count, columns) standard normal numbers of a counter-based generator."""
    numbers = np.random.Generator(np.random.Philox(key=key)).standard_normal(
        (count, columns), dtype=np.float32
    )
    return torch.from_numpy(numbers).to(dtype)


class _Iteration:
    """The run for a matrix (m, n) with m ≥ n."""

    def __init__(self, matrix: Matrix, rank: int, key: int, tolerance: float, proof: float) -> None:
        self.matrix = matrix
        self.rank = rank
        self.key = key
        self.tolerance = tolerance
        self.proof = proof
        self.X: list[Tensor] = []
        self.Y: list[Tensor] = []
        self.square = torch.zeros(0, 0, dtype=torch.float64)  # YᵀY
        self.products = 0
        self.captured: list[float] = []

    def run(self) -> Svd:
        matrix, floor = self.matrix, 1e-7 * math.sqrt(self.matrix.energy)
        width = -(-(self.rank + _OVERSAMPLING) // _LANES) * _LANES
        width = min(width, matrix.shape[1])
        X = gaussian(matrix.shape[1], width, self.key, torch.float32)
        rough, proofs = matrix.rough(), 0
        if rough is not None:
            X = directions(rough, X, self.rank, matrix.energy)
        X = orthonormal(X, (), 0.0)
        while True:
            # After a rough start one block is mostly enough: the probes that are to prove it are
            # multiplied with it, which takes less time than one after the other.
            drawn = probes([X], self.key + 1) if rough is not None and not self.X else None
            Z, R, first = self._multiplied(X, drawn)
            likely = self._converged() or (rough is not None and not proofs)
            # Whether bfloat16 came near enough does not show where nearly nothing is left.
            early = rough is not None and len(self.X) == 1 and self._left() < _TOLD * matrix.energy
            excess = self._proof(Z, R, first) if likely and not early else None
            proofs += excess is not None
            if excess is not None and (self._is_enough(excess) or proofs >= _MOST_PROOFS):
                return self._result(excess)
            X = orthonormal(Z, self.X, floor)
            if not X.shape[1] or len(self.X) >= _MOST_BLOCKS:
                return self._result(self._proof(Z, R, first) if excess is None else excess)

    def _multiplied(self, X: Tensor, drawn: Probes | None) -> tuple[Tensor, Tensor, Probes | None]:
        """Keep X and Y = A X = Q R; -> Z = Aᵀ Q, R, and the probes with their products, if any."""
        width = X.shape[1]
        both = X if drawn is None else torch.cat([X, drawn.V], 1)
        images = self.matrix.matmul(both)
        Y, rest = images[:, :width], images[:, width:]
        self.X.append(X)
        self.Y.append(Y)
        self.square = bordered(self.square, torch.cat([gram(each, Y) for each in self.Y]))
        Q, R = whitened(Y, self.square[-width:, -width:])
        back = self.matrix.rmatmul(torch.cat([Q, rest], 1))
        self.products += both.shape[1] + back.shape[1]
        kept = Q.shape[1]
        found = drawn and Probes(drawn.V, drawn.R, rest, back[:, kept:])
        return back[:, :kept], R, found

    def _wanted(self, bound: float) -> float:
        """The excess that keeps the error within `bound` times the best."""
        return (1 - bound**-2) * max(self._left(), 0.0)

    def _left(self) -> float:
        """What the last block left of ‖A‖², but for the rounding of products."""
        return self.matrix.energy - self.captured[-1]

    def _is_enough(self, excess: Tensor) -> bool:
        return float(excess[-1]) <= self._wanted(self.proof)

    def _converged(self) -> bool:
        """Whether what further blocks would add, as a geometric series, is within the slack."""
        values = torch.linalg.eigvalsh(self.square).flip(0)[: self.rank]
        self.captured.append(float(values.sum()))
        error = self._left()
        # Of rounding noise each block adds about a third of the one before: less is not believed,
        # for the first blocks find what stands out of it, and that goes faster.
        missing = to_come(self.captured, least=0.35)
        return (
            missing <= _CERTAIN * self._wanted(self.tolerance)
            or error <= ROUNDING**2 * self.matrix.energy
        )

    def _proof(self, Z: Tensor, R: Tensor, first: Probes | None) -> Tensor:
        """(rank) what the best of each rank has more; Z R is AᵀA times the last block."""
        basis = Basis(self.X, self.square, Z, R, self.matrix.energy)
        known = Bordered(basis, self.rank)
        excess = free_bound(known, basis.left_over)
        rounding = self._left() <= ROUNDING**2 * self.matrix.energy
        if self._is_enough(excess) or rounding:
            return excess
        first = first or probes(basis.X, self.key + 1)
        wanted = self._wanted(self.proof)
        probed, used = probed_bound(self.matrix, basis, known, first, wanted)
        self.products += used
        return torch.minimum(excess, probed)

    def _result(self, excess: Tensor) -> Svd:
        values, vectors = torch.linalg.eigh(self.square)
        sizes = values.flip(0)[: self.rank].clamp_min(0).sqrt()
        vectors = vectors.flip(1)[:, : self.rank]
        left = torch.cat(self.Y, 1) @ (vectors / sizes.clamp_min(1e-300)).to(torch.float32)
        right = torch.cat(self.X, 1) @ vectors.to(torch.float32)
        energy = self.matrix.energy
        # No products in float32 prove that there is nothing more.
        excess = excess.clamp_min(ROUNDING**2 * energy)
        return Svd(left, sizes, right, energy, energy, excess, products=self.products)
