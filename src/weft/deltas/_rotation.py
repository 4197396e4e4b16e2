"""Rotations of W's columns, block by block: what OFT and BOFT share.

The Cayley transform makes an orthogonal matrix R of a skew-symmetric Q: R = (I − Q)(I + Q)⁻¹.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def cayley(Q: Tensor) -> Tensor:
    """(n, size, size) skew-symmetric -> (n, size, size) orthogonal."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    R: Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False)
    return R


def rotate(weight: Tensor, R: Tensor, out: Tensor) -> None:
    """Every row w of `weight`, cut into blocks: `out` = R @ w, block by block.

    `weight` and `out` (rows, n · size), `R` (n, size, size).
    """
    rows, (blocks, size, _) = weight.shape[0], R.shape
    turned = torch.bmm(R, weight.reshape(rows, blocks, size).permute(1, 2, 0))
    out.copy_(turned.permute(2, 0, 1).reshape(rows, -1))
