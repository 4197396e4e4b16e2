"""BD-LoRA: W′ = W + scaling · B @ A, where one of the factors is block-diagonal and stored so.

`side` says which: A (r, in / n) for the A (r, in) that has its n chunks of r / n rows along the
diagonal, or B (out, r / n) likewise, with n = `blocks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas._low_rank import Factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("A", "B")


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    blocks = params["blocks"]
    assert isinstance(blocks, int)
    inner = shapes["A"][1] * (blocks if params["side"] == "A" else 1)
    whole_chunks = shapes[str(params["side"])][0] % blocks == 0
    return (False,) if whole_chunks and weight == (shapes["B"][0], inner) else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Factors:
    count, side = delta.param("blocks", 1), delta.param("side", "A")
    assert isinstance(count, int)
    whole = {role: source.whole(role) for role in ("A", "B")}
    chunks = whole[str(side)].chunk(count)
    whole[str(side)] = torch.block_diag(*chunks)  # type: ignore[no-untyped-call]
    return Factors(whole["B"], whole["A"], delta.scaling)


def square(state: Factors) -> float:
    return state.square()


def block(state: Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)
