"""The singular values and vectors of a tensor's difference, all of its matrices together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weft.decompose.factors import split
from weft.decompose.krylov import times_the_best
from weft.decompose.noise import Signal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weft.decompose.krylov import Svd


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of the matrices e of a tensor, ΔWₑ ≈ Uₑ Σₑ Vₑᵀ, without the vectors.

    There is one matrix, except of fused experts.

    Attributes:
        shape: (m, n) of each.
        values: Σ (E, k), float64, falling, and zero behind a matrix's rank.
        energy: ‖ΔW‖² (E).
        error: ‖ΔW − U Σ Vᵀ‖² (E), of all k.
        excess: (E, k) how much more of it the optimum of each rank may have, at most; of matrices
            that were decomposed with weights, as in the weighted norm (see `even.unweighted`).
        above: What stands above the noise of rounding (E, 5): the numbers of a `Signal`, -1 for a
            `fits` of None, and the noise's edge.
    """

    shape: tuple[int, int]
    values: Tensor
    energy: Tensor
    error: Tensor
    excess: Tensor
    above: Tensor

    @property
    def rank(self) -> int:
        """The most that there is."""
        return self.values.shape[1]

    def together(self) -> list[float]:
        """√Σₑ σₑᵢ²: what each further unit of rank adds, of all matrices."""
        found: list[float] = self.values.square().sum(0).sqrt().tolist()
        return found

    def errors(self, rank: int) -> list[float]:
        """‖ΔW − U Σ Vᵀ‖² of each matrix, cut to `rank`."""
        left_out = self.values[:, rank:].square().sum(1)
        return [float(error) for error in self.error + left_out]

    def bound(self, rank: int) -> float:
        """How many times the optimum's error the error is at this rank, at most."""
        rank = min(rank, self.rank)
        error = math.fsum(self.errors(rank))
        excess = math.fsum(self.excess[:, rank - 1].tolist()) if rank else 0.0
        return times_the_best(error, excess, float(self.energy.sum()))

    def signal(self, matrix: int = 0) -> Signal:
        """What of a matrix stands above the noise of rounding."""
        rank, known, fits, kept, _ = self.above[matrix].tolist()
        return Signal(int(rank), bool(known), None if fits < 0 else bool(fits), kept)

    def edge(self, matrix: int = 0) -> float:
        """Where the singular values of the noise end."""
        return float(self.above[matrix, -1])


@dataclass(frozen=True, slots=True)
class Decomposed:
    """A spectrum with its vectors.

    Attributes:
        spectrum: Of the matrices.
        left: U (E, m, k), float32.
        right: V (E, n, k).
    """

    spectrum: Spectrum
    left: Tensor
    right: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        found = {name: getattr(self.spectrum, name) for name in _KEPT}
        found |= {"left": self.left, "right": self.right}
        found["shape"] = torch.tensor(self.spectrum.shape)
        return {name: each.contiguous() for name, each in found.items()}

    def factors(self, rank: int, scaling: float) -> list[tuple[Tensor, Tensor]]:
        """(U √Σ, V √Σ) of each matrix, (m, rank) and (n, rank), float64, divided by √scaling."""
        found = []
        for left, values, right in zip(self.left, self.spectrum.values, self.right, strict=True):
            A, B = split(left[:, :rank], values[:rank] / scaling, right[:, :rank])
            found.append((_padded(B, rank), _padded(A.T, rank)))
        return found


def clear(values: Sequence[float]) -> list[float]:
    """Those that are more than what float32 makes of zero."""
    return [value for value in values if value > _CLEAR * values[0]]


_CLEAR = 1e-6
_KEPT = ("values", "energy", "error", "excess", "above")
SMALL = ("shape", *_KEPT)  # the names that a spectrum takes


def spectrum_of(tensors: Mapping[str, Tensor]) -> Spectrum:
    """Of what `Decomposed.tensors` gave, the vectors aside."""
    rows, columns = tensors["shape"].tolist()
    return Spectrum((rows, columns), **{name: tensors[name] for name in _KEPT})


def decomposed_of(tensors: Mapping[str, Tensor]) -> Decomposed:
    """What `Decomposed.tensors` gave."""
    return Decomposed(spectrum_of(tensors), tensors["left"], tensors["right"])


def _padded(values: Tensor, rank: int) -> Tensor:
    """With columns of zeros up to `rank`."""
    if values.shape[1] == rank:
        return values
    return torch.nn.functional.pad(values, (0, rank - values.shape[1]))


def stacked(svds: Sequence[Svd], signals: Sequence[Signal], edges: Sequence[float]) -> Decomposed:
    """The factorisations of a tensor's matrices, brought to one rank by zeros.

    Args:
        svds: One for each matrix.
        signals: What stands above the noise of each.
        edges: Where that ends.
    """
    rank = max(svd.rank for svd in svds)
    return Decomposed(
        Spectrum(
            shape=(svds[0].left.shape[0], svds[0].right.shape[0]),
            values=torch.stack([_padded(svd.values.double()[None], rank)[0] for svd in svds]),
            energy=torch.tensor([svd.energy for svd in svds], dtype=torch.float64),
            error=torch.tensor([svd.error for svd in svds], dtype=torch.float64),
            excess=torch.stack([_held(svd.excess.double(), rank) for svd in svds]),
            above=torch.tensor(
                [_numbers(*each) for each in zip(signals, edges, strict=True)], dtype=torch.float64
            ),
        ),
        left=torch.stack([_padded(svd.left.float(), rank) for svd in svds]),
        right=torch.stack([_padded(svd.right.float(), rank) for svd in svds]),
    )


def _numbers(above: Signal, edge: float) -> tuple[float, ...]:
    fits = -1 if above.fits is None else above.fits
    return above.rank, above.known, fits, above.kept, edge


def _held(values: Tensor, rank: int) -> Tensor:
    """The last value again and again, up to `rank`: beyond its rank a matrix gains nothing."""
    if not len(values):
        return torch.zeros(rank, dtype=torch.float64)
    return torch.cat([values, values[-1:].expand(rank - len(values))])


def rounding(
    exact: Sequence[tuple[Tensor, Tensor]],
    written: Sequence[tuple[Tensor, Tensor]],
    scaling: float,
) -> list[float]:
    """‖scaling (Lw Rwᵀ − L Rᵀ)‖² of each matrix, from Gram matrices, in float64.

    What is rounded off is orthogonal to what was left out, but for products of two roundings: so
    the error of what is written is the sum of this and of what was left out. Of a matrix that was
    decomposed with weights it is so on average, roundings being as often up as down.
    """
    found = []
    for (left, right), (wide, high) in zip(exact, written, strict=True):
        # L̃ R̃ᵀ − L Rᵀ = D R̃ᵀ + L Eᵀ with D = L̃ − L and E = R̃ − R, which are small: nothing cancels.
        whole = high.double()
        D, E = wide.double() - left, whole - right
        square = ((D.T @ D) * (whole.T @ whole)).sum() + ((left.T @ left) * (E.T @ E)).sum()
        square += 2 * ((D.T @ left) * (whole.T @ E)).sum()
        found.append(scaling**2 * max(float(square), 0.0))
    return found
