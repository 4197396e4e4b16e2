"""Where to begin: the largest directions of a matrix, found by products that are rounded.

Processors that multiply bfloat16 do so two to four times as fast as float32. A block Krylov
iteration (see `krylov`) on such products finds the directions to a few thousandths, from which one
or two products in float32 go on to what is wanted. Nothing that is reported comes from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weft.decompose._orthogonal import bordered, orthonormal, roughly_whitened
from weft.decompose._series import to_come

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_MOST_BLOCKS = 6
# What bfloat16 products leave of a sum of squares is off by about this share of it.
_ROUNDED = 1e-4
# What is less than this share of a product is its rounding.
_NOISE = 2**-9
# What further blocks would take off the error that is left when no more are made, as a share of it.
_SETTLED = 1e-3


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster there than those of float32."""
    if device.type != "cpu":
        return device.type == "cuda"
    # PyTorch before 2.10 does not say.
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@dataclass(frozen=True, slots=True)
class Rough:
    """A matrix that is only to show its directions.

    Attributes:
        values: A (m, n), bfloat16.
        turned: It stands for Aᵀ.
    """

    values: Tensor
    turned: bool = False

    def matmul(self, X: Tensor) -> Tensor:
        """A @ X, each result rounded to bfloat16, in float32."""
        A = self.values
        if self.turned:
            # Xᵀ times the values as they lie is faster than their transpose times X; and half as
            # fast again where Xᵀ is a matrix of its own.
            left = X.T.to(A.device, A.dtype).contiguous()
            return (left @ A).cpu().float().T
        return (A @ X.to(A.device, A.dtype)).cpu().float()

    def rmatmul(self, Y: Tensor) -> Tensor:
        """Aᵀ @ Y, the same."""
        return Rough(self.values, not self.turned).matmul(Y)


def directions(matrix: Rough, X: Tensor, rank: int, energy: float) -> Tensor:
    """A basis (n, k) of nearly the space of the k largest right singular vectors.

    It is orthonormal but for rounding.

    Args:
        matrix: A (m, n).
        X: (n, k) columns to begin with.
        rank: How many of the k directions matter.
        energy: ‖A‖².
    """
    width = X.shape[1]
    X = roughly_whitened(X)[0]
    blocks, captured = [X], list[float]()
    T = X.new_zeros(0, 0, dtype=torch.float64)
    while True:
        Q, R = roughly_whitened(matrix.matmul(X))
        Z = matrix.rmatmul(Q)
        found = torch.cat(blocks, 1)
        T = bordered(T, found.T @ (Z @ R.to(Z.dtype)))  # Xᵀ AᵀA Xⱼ
        captured.append(float(torch.linalg.eigvalsh(T.float())[-rank:].sum()))
        settled = max(_SETTLED * (energy - captured[-1]), _ROUNDED * captured[-1])
        ended = to_come(captured) <= settled or len(blocks) >= _MOST_BLOCKS
        if not ended:
            floor = _NOISE * float(Z.norm(dim=0).max())
            X = _beside(orthonormal(_beside(Z, found), (), floor), found)
        if ended or not X.shape[1]:
            vectors = torch.linalg.eigh(T.float())[1]
            best: Tensor = found @ vectors[:, -width:]
            return best
        blocks.append(X)


def _beside(X: Tensor, basis: Tensor) -> Tensor:
    """X − Q Qᵀ X."""
    return X.addmm(basis, basis.T @ X, alpha=-1)
