"""OSF (arXiv:2504.07097): W′ = W + U diag(S) V − U₀ diag(S₀) V₀, the end of an SVD trained.

`U` (out, k), `S` (k), `V` (k, in) began as U₀, S₀, V₀, the singular vectors and values of W that
belong to the k smallest. What they were is not saved, and comes from W again, as in training: by an
SVD in float32, rounded to the dtype of the base (the one that it has on disk counts). The signs of
singular vectors cancel out. W is in memory as a whole, three times over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True


@dataclass(frozen=True, slots=True)
class State:
    """Each `left` (out, k) @ `right` (k, in): what is, and what was."""

    left: Tensor
    right: Tensor
    left_before: Tensor
    right_before: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    fits = weight == (shapes["U"][0], shapes["V"][1]) and shapes["S"][0] <= min(weight)
    return (False,) if fits else ()


def scratch(shape: Shape) -> int:
    """W, its decomposition and its parts, in float32."""
    return 4 * 8 * math.prod(shape)


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    U, S, V = (source.whole(role) for role in "USV")
    W = torch.empty(source.shape, dtype=torch.float32, device=U.device)
    for start, weight in blocks():
        W[start : start + weight.shape[0]] = weight
    dtype, kept = getattr(torch, source.dtype), min(W.shape) - len(S)
    before = torch.linalg.svd(W, full_matrices=False)
    U0, S0, V0 = (
        part.to(dtype).to(U.dtype)
        for part in (before.U[:, kept:], before.S[kept:], before.Vh[kept:])
    )
    return State(U * S, V, U0 * S0, V0)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    stop = start + out.shape[0]
    torch.mm(state.left[start:stop], state.right, out=out)
    out.sub_(state.left_before[start:stop] @ state.right_before)
