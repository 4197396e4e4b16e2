"""HRA (arXiv:2405.17484): W′ = W · H₁ ⋯ H_r with Householder reflections H = I − 2 u uᵀ / ‖u‖².

`u` (in · kernel, r), one reflection per column. Their product is I − U T Uᵀ with U the columns of
length 1 and T upper triangular (r, r), so that each row of W costs two thin products. `orthogonal`:
the columns are made orthogonal first (Gram–Schmidt); then T = 2 I.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from weft.core.errors import NumericsError
from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
_DEPENDENT = 1e-6  # what is left of a column beside those before it, relative to its length


@dataclass(frozen=True, slots=True)
class State:
    """ΔW = −(W @ left) @ right, `left` = U (columns, r) and `right` = T Uᵀ (r, columns)."""

    left: Tensor
    right: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    return (False,) if len(weight) > 1 and prod(weight[1:]) == shapes["u"][0] else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    u = source.whole("u")
    wide = u.double()  # r columns: the precision costs nothing, and dependent ones need it
    U = wide / wide.norm(dim=0)
    if delta.param("orthogonal", False):
        U = _orthogonal(U, dict(delta.tensors)["u"].name)
        T = 2 * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    else:
        T = _triangle(U)
    return State(U.to(u.dtype), (T @ U.T).to(u.dtype))


def _triangle(U: Tensor) -> Tensor:
    """T of I − U T Uᵀ, the product of reflections, column by column."""
    rank = U.shape[1]
    products = U.T @ U
    T = torch.zeros(rank, rank, dtype=U.dtype, device=U.device)
    for n in range(rank):
        T[:n, n] = -2 * (T[:n, :n] @ products[:n, n])
        T[n, n] = 2
    return T


def _orthogonal(U: Tensor, name: str) -> Tensor:
    """Gram–Schmidt on columns of length 1."""
    columns: list[Tensor] = []
    for column in U.T:
        for other in columns:
            column = column - (other @ column) * other
        length = column.norm()
        if length < _DEPENDENT:
            raise NumericsError(
                f"columns of {name} depend on each other, and cannot be made orthogonal",
                "the adapter was never trained: HRA begins with columns in equal pairs",
            )
        columns.append(column / length)
    return torch.stack(columns, dim=1)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    torch.mm(weight @ state.left, state.right, out=out)
    out.neg_()
