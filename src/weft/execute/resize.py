"""The factors of a LoRA, made smaller: in float64, in the small space of their rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weft.core.errors import NumericsError
from weft.decompose.factors import split, svd_of_product
from weft.deltas._experts import down, up

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import TensorRef
    from weft.execute._blocks import Files
    from weft.plan.resize import Group, Pair


@dataclass(frozen=True, slots=True)
class Resized:
    """A pair of factors as it is written, and what it lost.

    Attributes:
        tensors: Ref of the old factor -> the bytes of the new one.
        energy: ‖ΔW‖².
        cut: Of it, what the rank leaves out.
        error: ‖ΔW − ΔW′‖² with the new factors as they are stored.
    """

    tensors: dict[TensorRef, bytes]
    energy: float
    cut: float
    error: float


def spectrum(group: Group, files: Files) -> list[float]:
    """The singular values that share a rank, as one falling list: √Σ σᵢ² over pairs and experts."""
    total = torch.zeros(group.pairs[0].rank, dtype=torch.float64)
    for pair in group.pairs:
        for B, A in _products(pair, files):
            values = svd_of_product(B, A)[1]
            total[: values.shape[0]] += (pair.scaling * values).square()
    # A rank beyond the sides of the matrix, or of factors that depend on each other, adds nothing.
    count = int((total > 1e-28 * float(total.max())).sum())
    return [math.sqrt(value) for value in total[:count].tolist()]


def resized(pair: Pair, rank: int, dtypes: tuple[str, str], files: Files) -> Resized:
    """`pair` to `rank`, scaling 1.

    Args:
        pair: The factors, where they lie.
        rank: Of each expert; where the matrices have less, zeros fill it up.
        dtypes: Of the new A and B.
        files: They are read through.

    Raises:
        NumericsError: The new factors overflow their dtype.
    """
    types = [getattr(torch, name) for name in dtypes]
    new_A, new_B = [], []
    energy = cut = error = 0.0
    for B, A in _products(pair, files):
        left, values, right = svd_of_product(B, A)
        values = pair.scaling * values
        count = min(rank, values.shape[0])
        small_A, small_B = split(left[:, :count], values[:count].abs(), right[:, :count])
        if pair.scaling < 0:
            small_B = -small_B
        small_A = torch.nn.functional.pad(small_A, (0, 0, 0, rank - count)).to(types[0])
        small_B = torch.nn.functional.pad(small_B, (0, rank - count)).to(types[1])
        new_A.append(small_A)
        new_B.append(small_B)
        energy += float(values.square().sum())
        cut += float(values[count:].square().sum())
        error += _distance(pair.scaling * B, A, small_B.double(), small_A.double())
    tensors = {
        pair.A: _bytes(torch.cat(new_A)),
        pair.B: _bytes(_together(new_B, grouped=pair.grouped)),
    }
    if not math.isfinite(error):
        raise NumericsError(
            f"the factors of {pair.A.name} overflow {' or '.join(dict.fromkeys(dtypes))}",
            "--dtype bfloat16 or float32 holds them",
        )
    if pair.bias is not None:
        bias = _values(pair.bias, files)
        tensors[pair.bias] = _bytes((pair.scaling * bias).to(getattr(torch, pair.bias.dtype)))
    return Resized(tensors, energy, cut, error)


def _products(pair: Pair, files: Files) -> list[tuple[Tensor, Tensor]]:
    """B (out, r) and A (r, in) in float64, of each expert."""
    A, B = _values(pair.A, files).flatten(1), _values(pair.B, files).flatten(1)
    downs, ups = down(A, pair.experts), up(B, pair.experts, grouped=pair.grouped)
    return list(zip(ups, downs, strict=True))


def _together(parts: list[Tensor], *, grouped: bool) -> Tensor:
    """B (out, r) of each expert -> (out, r · E), in the order that `up` takes apart."""
    stacked = torch.stack(parts, 1 if grouped else 2)
    return stacked.flatten(1)


def _distance(B: Tensor, A: Tensor, other_B: Tensor, other_A: Tensor) -> float:
    """‖B A − B′ A′‖²: the norm of one product of all four, so that nothing cancels."""
    left = torch.linalg.qr(torch.cat([B, -other_B], 1))[1]
    right = torch.linalg.qr(torch.cat([A, other_A]).T)[1]
    return float((left @ right.T).square().sum())


def _values(ref: TensorRef, files: Files) -> Tensor:
    raw = bytearray(ref.nbytes)
    files.read(ref.file, ref.start, memoryview(raw))
    return torch.frombuffer(raw, dtype=getattr(torch, ref.dtype)).view(ref.shape).double()


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().flatten().view(torch.uint8).numpy().tobytes()
