"""FRoD (doi:10.1609/aaai.v40i31.39813): W′ = U (S + diag(λ)) Vᵀ, where W = U diag(λ₀) Vᵀ.

`V` (in, in) is fixed, and shared by the modules of one role in all layers; U, of unit columns, and
λ₀ follow from W. Trained are `l`, which is λ (in), and S: `values` (n) at `indices` (2, n), of the
size `indices_size`. A row of W′ needs no other of W, after a pass over all of them for λ₀.

Where W has a lower rank than V, columns of U are what rounding left in W V⁻ᵀ, made as long as the
others: all of it is done in float64, and with matrices of (in, in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas import _indices

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
LASTING = {"V": (4, 8)}  # as it is, and its inverse in float64
# As in training: a column of U that is next to nothing is none.
_NOTHING = 1e-12


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    if len(weight) != 2:
        return ()
    (inputs,) = shapes["l"]
    return tuple(turned for turned in (False, True) if weight[0 if turned else 1] == inputs)


@dataclass(frozen=True, slots=True)
class State:
    """W @ `before` is U, U @ `after` is W′: (in, in), in float64."""

    before: Tensor
    after: Tensor


def scratch(shape: Shape) -> int:
    """What is made of the shared basis and its inverse, in float64."""
    return 8 * 5 * shape[-1] ** 2 + 8 * 2 * math.prod(shape)


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    V = source.shared("V").double()
    _indices.load(delta, source, "indices_size", len(V) + 1)
    inverse = source.shared("V", _inverse).T
    squares = torch.zeros(len(V), dtype=torch.float64, device=V.device)
    for _, weight in blocks():
        squares += (weight.double() @ inverse).square_().sum(0)
    norms = squares.sqrt()
    where = _indices.load(delta, source, "indices", *V.shape)
    values = source.whole("values").double()
    S = torch.sparse_coo_tensor(where, values, V.shape, check_invariants=True)  # else torch warns
    right = V.T.contiguous()
    after = torch.sparse.mm(S, right).addcmul_(source.whole("l").double()[:, None], right)
    return State(inverse * torch.where(norms > _NOTHING, 1 / norms, 0), after)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    wide = weight.double()
    out.copy_(wide @ state.before @ state.after - wide)


def _inverse(V: Tensor) -> Tensor:
    """In float64; modules of all layers use it, and it takes as long as what is done with it."""
    V = V.double()
    inverse: Tensor
    inverse, failed = torch.linalg.inv_ex(V)
    if failed:
        inverse = torch.linalg.pinv(V, rtol=1e-6)
    return inverse
