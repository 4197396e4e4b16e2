"""LoRA on fused experts (`target_parameters`): Wₑ′ = Wₑ + scaling · Bₑ @ Aₑ for every expert e.

W (E, out, in), `A` (E · r, in), `B` (out, r · E). `exchanged`: W is (E, in, out) for these factors,
and the update of each expert (Bₑ @ Aₑ)ᵀ. `grouped`: B has the columns of an expert together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.deltas._experts import Stack, down, matrix, together, up

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

__all__ = ["ADDITIVE", "SILENT", "block", "matrix", "orientations", "prepare", "square", "together"]

ADDITIVE = True
SILENT = ("A", "B")


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    sides = (shapes["B"][0], shapes["A"][1])
    expected = (params["experts"], *(sides[::-1] if params["exchanged"] else sides))
    return (False,) if weight == expected else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Stack:
    experts = delta.param("experts", 0)
    assert isinstance(experts, int)
    grouped = bool(delta.param("grouped", False))
    A, B = down(source.whole("A"), experts), up(source.whole("B"), experts, grouped=grouped)
    if delta.param("exchanged", False):
        A, B = B.transpose(1, 2), A.transpose(1, 2)
    return Stack(B.contiguous(), A.contiguous(), delta.scaling)


def square(state: Stack) -> float:
    return state.square()


def block(state: Stack, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)
