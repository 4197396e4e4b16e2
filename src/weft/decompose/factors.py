"""LoRA's two factors, out of a singular value decomposition and into one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def split(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A = √Σ Vᵀ (k, n) and B = U √Σ (m, k), in float64: B @ A = U Σ Vᵀ.

    Equal norms keep both within the range of half precision. Where U and V are not the basis's
    natural choice of sign, neither is that of A and B; the product does not depend on it.
    """
    root = values.double().clamp_min(0).sqrt()
    return (right.double() * root).T.contiguous(), left.double() * root


def svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), Σ (k) and V (n, k) of B @ A without forming it, in float64; k ≤ r.

    B = Q_b R_b and Aᵀ = Q_a R_a, and the SVD of the small R_b R_aᵀ gives all of it: exact.

    Args:
        B: (m, r).
        A: (r, n).
    """
    left, small = torch.linalg.qr(B.double())
    right, other = torch.linalg.qr(A.double().T)
    U, values, V = torch.linalg.svd(small @ other.T, full_matrices=False)
    return left @ U, values, right @ V.T
