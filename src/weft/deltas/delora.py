"""DeLoRA (arXiv:2503.18225): W′ = W + B @ diag(λ / (r · ‖Aᵢ‖ · ‖Bⁱ‖)) @ A @ diag(norm).

`A` (r, in) with rows Aᵢ, `B` (out, r) with columns Bⁱ, `lambda` (1,), and `norm` (in,), that of W's
columns as it was when training began. Norms of A and B are taken to be 1e-4 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("A", "B", "lambda", "norm")
_LEAST = 1e-4


@dataclass(frozen=True, slots=True)
class State:
    """ΔW = left @ right · norm, `left` (out, r), `right` (r, in)."""

    left: Tensor
    right: Tensor
    norm: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    return (False,) if weight == (shapes["B"][0], shapes["A"][1]) else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    A, B = source.whole("A"), source.whole("B")
    lengths = A.norm(dim=1).clamp(min=_LEAST) * B.norm(dim=0).clamp(min=_LEAST)
    factors = source.whole("lambda") / A.shape[0] / lengths
    return State(B * factors, A, source.whole("norm"))


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    torch.mm(state.left[start : start + out.shape[0]], state.right, out=out)
    out.mul_(state.norm)
