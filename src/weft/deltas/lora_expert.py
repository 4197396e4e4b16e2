"""LoRA on fused experts, for a matrix of one of them: W′ = W + scaling · B[rows, columns] @ A.

W (rows, in) is a part of the expert, from row `first` of what is fused on (the up projection behind
the gate). `A` (r, in) is the expert's own; `B` (out, r · E) is that of all, as in `lora_experts`.
`exchanged`: A (r, out) and B (in, r · E), and the update is (B @ A)ᵀ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.deltas._experts import up
from weft.deltas._low_rank import Factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    first = params["first"]
    outer, inner = shapes["B"][0], shapes["A"][1]
    if params["exchanged"]:
        outer, inner = inner, outer
    assert isinstance(first, int)
    fits = len(weight) == 2 and weight[1] == inner and first + weight[0] <= outer
    return (False,) if fits else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Factors:
    experts, expert, first = (delta.param(n, 0) for n in ("experts", "expert", "first"))
    assert isinstance(experts, int)
    assert isinstance(expert, int)
    assert isinstance(first, int)
    grouped = bool(delta.param("grouped", False))
    left = up(source.shared("B"), experts, grouped=grouped)[expert]
    right = source.whole("A")
    if delta.param("exchanged", False):
        left, right = right.T, left.T
    rows = slice(first, first + source.shape[0])
    return Factors(left[rows].contiguous(), right.contiguous(), delta.scaling)


def square(state: Factors) -> float:
    return state.square()


def block(state: Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)
