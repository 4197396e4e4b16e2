"""How much energy the best matrix of a rank may have beyond what was found: proofs.

H = AᵀA in the basis X of the iteration and its complement is

    [[T, Sᵀ], [S, H₂]],   T = YᵀY,   S = (I − XXᵀ) H X,

and the first k eigenvalues of H are, in sum, at most those of any matrix that is no smaller. With
μ ≥ ‖H₂‖ that is [[T, Sᵀ], [S, μI]], of which all but a small block is diagonal.

`free_bound` takes μ = tr H₂ = ‖A‖² − tr T. `probed_bound` finds a μ by block Lanczos on H₂ from
random vectors G that the basis knows nothing of (Hochstenbach, SIAM J. Matrix Anal. 34, 2013, for
one vector): for a unit eigenvector v of the largest eigenvalue λ, and the Lanczos vectors
Vⱼ = Pⱼ(H₂) G of which Pⱼ are known s × s polynomials, Σ ‖vᵀVⱼ‖² ≤ 1. So σ_min(Σ Pⱼ(λ) Pⱼ(λ)ᵀ) is at
most ‖gᵀR₀⁻¹‖⁻² for the Gaussian gᵀ = vᵀG, which is shorter than assumed with probability `_DOUBT`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from weft.decompose._orthogonal import gram, whitened, without

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weft.decompose.matrices import Matrix

_DOUBT = 1e-6
_PROBES = 24
_STEPS = 12
_STEEP = 1e-5  # β is not inverted, if its singular values differ by more
_NEAR = 5e-3  # of μ, which may be that much more than is proved
_ROUNDED = 1e-6  # of √(‖H‖ ‖H₂‖): what float32 may add to a product with H₂


@dataclass(frozen=True, slots=True)
class Basis:
    """What an iteration knows at its end.

    Attributes:
        X: Its blocks; together (n, l).
        square: T (l, l).
        Z, R: H times the last block of X is Z R.
        energy: ‖A‖².
    """

    X: list[Tensor]
    square: Tensor
    Z: Tensor
    R: Tensor
    energy: float

    @property
    def left_over(self) -> float:
        """The trace of H₂."""
        return max(self.energy - float(self.square.trace()), 0.0)

    def bordered(self) -> tuple[Tensor, Tensor]:
        """T and the S, brought to a square of the last block's width, that borders it."""
        rest = gram(without(self.Z, self.X))
        values, vectors = torch.linalg.eigh(self.R.T @ rest @ self.R)
        last = (vectors * values.clamp_min(0).sqrt()).T
        S = torch.zeros(last.shape[0], self.square.shape[0], dtype=torch.float64)
        S[:, -last.shape[1] :] = last
        return self.square, S


class Bordered:
    """What the bordered matrix says of the first eigenvalues, for one μ after another."""

    def __init__(self, basis: Basis, rank: int) -> None:
        self.rank = rank
        T, S = basis.bordered()
        width = S.shape[0]
        self._matrix = torch.cat(
            [
                torch.cat([T, S.T], 1),
                torch.cat([S, torch.zeros(width, width, dtype=torch.float64)], 1),
            ]
        )
        self._corner = self._matrix.diagonal()[-width:]
        self.found = torch.linalg.eigvalsh(T).flip(0)[:rank]

    def excess(self, mu: float) -> Tensor:
        """(rank) what the first k eigenvalues of H have, in sum, beyond those of T; ‖H₂‖ ≤ mu."""
        self._corner.fill_(mu)
        above = torch.linalg.eigvalsh(self._matrix).flip(0)[: self.rank].clamp_min(mu)
        gained: Tensor = (above - self.found).clamp_min(0).cumsum(0)
        return gained


def free_bound(bordered: Bordered, left_over: float) -> Tensor:
    """(rank) the excess that ‖A‖² alone proves."""
    # AAᵀ = YYᵀ + EEᵀ with ‖E‖² = tr H₂: no rank gains more than all of it.
    return bordered.excess(left_over).clamp_max(left_over)


@dataclass(frozen=True, slots=True)
class Probes:
    """Random vectors beside a basis.

    Attributes:
        V, R: G = V R, without what of it is in the basis; V (n, s) has orthonormal columns.
        image, back: A V and Aᵀ A V, where they are known already.
    """

    V: Tensor
    R: Tensor
    image: Tensor | None = None
    back: Tensor | None = None


def probes(X: Sequence[Tensor], key: int) -> Probes:
    """Drawn for the basis X (n, l).

    Args:
        X: Its blocks.
        key: Of the random numbers: not the one that the basis was made with.
    """
    numbers = np.random.Generator(np.random.Philox(key=key)).standard_normal(
        (X[0].shape[0], _PROBES), dtype=np.float32
    )
    return Probes(*whitened(without(torch.from_numpy(numbers), X)))


def probed_bound(
    matrix: Matrix, basis: Basis, bordered: Bordered, first: Probes, wanted: float
) -> tuple[Tensor, int]:
    """(rank) the excess that probes prove, with probability 1 − 10⁻⁶; and the columns multiplied.

    Args:
        matrix: A (m, n), m ≥ n.
        basis: Of it.
        bordered: Of the basis.
        first: Drawn for the basis.
        wanted: The excess of all the rank that is enough.
    """
    V, R, image, raw = first.V, first.R, first.image, first.back
    best = torch.full((bordered.rank,), math.inf, dtype=torch.float64)
    if V.shape[1] < _PROBES:
        return best, 0
    short = 2 * (_DOUBT * math.gamma(_PROBES / 2 + 1)) ** (2 / _PROBES)
    lanczos = _Lanczos(float(R[0].norm()) ** 2 / short)
    seen = [V]
    products = 0
    head = float(torch.linalg.eigvalsh(basis.square)[-1])
    for _ in range(_STEPS):
        if image is None or raw is None:
            image = matrix.matmul(V)
            raw = matrix.rmatmul(image)
            products += 2 * _PROBES
        alpha = gram(image)
        V, R = whitened(without(raw, [*basis.X, *seen]))
        image = None
        lanczos.add(alpha, R)
        # Below this β is what float32 made of nothing.
        noise = _ROUNDED * math.sqrt(head * max(lanczos.largest, 0.0))
        least = max(_STEEP * lanczos.rest, noise)
        steep = V.shape[1] < _PROBES or float(R[-1].norm()) <= least
        mu = lanczos.short_bound() if steep else lanczos.bound()
        best = torch.minimum(best, bordered.excess(mu))
        if steep or float(best[-1]) <= wanted:
            break  # the recurrence would need β⁻¹
        # What no proof can do: the bound is never below what the probes have seen.
        if float(bordered.excess(lanczos.largest)[-1]) > wanted:
            break
        seen.append(V)
    return best, products


class _Lanczos:
    """The recurrence H₂ Vⱼ = Vⱼ αⱼ + Vⱼ₋₁ βⱼ₋₁ᵀ + Vⱼ₊₁ βⱼ, and what it says of ‖H₂‖."""

    def __init__(self, most: float) -> None:
        self.most = most  # σ_min(Σ Pⱼ Pⱼᵀ) at the largest eigenvalue, at most
        self.alphas: list[Tensor] = []
        self.betas: list[Tensor] = []
        self.largest = 0.0

    def add(self, alpha: Tensor, beta: Tensor) -> None:
        self.alphas.append(alpha)
        width = alpha.shape[0]
        size = width * len(self.alphas)
        T = torch.zeros(size, size, dtype=torch.float64)
        for n, block in enumerate(self.alphas):
            at = slice(n * width, (n + 1) * width)
            T[at, at] = block
            if n + 1 < len(self.alphas):
                after = slice((n + 1) * width, (n + 2) * width)
                T[after, at], T[at, after] = self.betas[n], self.betas[n].T
        self.largest = float(torch.linalg.eigvalsh(T)[-1])
        self.betas.append(beta)

    @property
    def rest(self) -> float:
        """‖β‖ of the last block."""
        return float(self.betas[-1][0].norm()) if len(self.betas[-1]) else 0.0

    def short_bound(self) -> float:
        """The μ that needs no β⁻¹, and tells little unless the last β is next to nothing.

        Of H₂ W = W T + V β Eᵀ for all vectors W so far, λ (Wᵀv) = T (Wᵀv) + E βᵀ (Vᵀv): so
        (λ − ‖T‖) ‖Wᵀv‖ ≤ ‖β‖, and ‖Wᵀv‖² is at least 1 / `most`.
        """
        return self.largest + self.rest * math.sqrt(self.most)

    def bound(self) -> float:
        """μ ≥ ‖H₂‖, but for the probability of very short random vectors.

        That σ_min grows with λ above T's eigenvalues is known of one vector, and taken to hold for
        blocks.
        """
        low, high = self.largest, 2 * self.largest
        inverses = [torch.linalg.inv(beta) for beta in self.betas]
        while not self._outgrows(high, inverses):
            low, high = high, 2 * high
            if not math.isfinite(high):
                return high
        while high - low > _NEAR * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self._outgrows(middle, inverses) else (middle, high)
        return high

    def _outgrows(self, x: float, inverses: Sequence[Tensor]) -> bool:
        """Whether σ_min(Σ Pⱼ(x) Pⱼ(x)ᵀ) is more than `most`; `inverses` are those of β."""
        identity = torch.eye(self.alphas[0].shape[0], dtype=torch.float64)
        before, now, total = torch.zeros_like(identity), identity, identity * (1 - self.most)
        for n, (alpha, inverse) in enumerate(zip(self.alphas, inverses, strict=True)):
            after = x * now - now @ alpha
            if n:
                after -= before @ self.betas[n - 1].T
            before, now = now, after @ inverse
            total += now @ now.T
        # It has a Cholesky factor, then; what is not finite proves nothing.
        return bool(total.isfinite().all()) and not int(torch.linalg.cholesky_ex(total).info)
