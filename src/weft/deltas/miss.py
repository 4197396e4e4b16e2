"""MiSS, first called Bone (arXiv:2409.15371): W′[o, i] = W[o, i] + block[i mod r, o mod m].

`block` (r, m) with m = out, or a divisor of it where `repeats` is set. A (out / r, r, r) block is
the variant Bat: W is cut into r × r squares, and each becomes W + W @ block[p] + block[p], p being
its row of squares.
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
SILENT = ("block",)


@dataclass(frozen=True, slots=True)
class State:
    """The block: (m, r), or of Bat (out / r, r, r)."""

    block: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    if len(weight) != 2:
        return ()
    outputs, inputs = weight
    *squares, rank, width = shapes["block"]
    if squares:
        fits = outputs == squares[0] * rank and inputs % rank == 0
    elif params["repeats"]:
        fits = outputs % width == 0 and rank <= inputs
    else:
        fits = outputs == width and rank <= inputs
    return (False,) if fits else ()


def together(shape: Shape, params: Mapping[str, Param]) -> int:
    """A row of squares of Bat, so that it is one product for all its columns."""
    return int(params["square"])  # type: ignore[arg-type]


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    block = source.whole("block")
    return State(block if block.dim() == 3 else block.T.contiguous())


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    (_bat if state.block.dim() == 3 else _plain)(state.block, weight, start, out)


def _plain(block: Tensor, weight: Tensor, start: int, out: Tensor) -> None:
    rows, columns = out.shape
    width, rank = block.shape
    row = block[torch.arange(start, start + rows, device=out.device) % width]
    whole = columns - columns % rank
    out[:, :whole].view(rows, -1, rank).copy_(row[:, None, :])
    out[:, whole:].copy_(row[:, : columns - whole])


def _bat(block: Tensor, weight: Tensor, start: int, out: Tensor) -> None:
    rank = block.shape[-1]
    squares = block[start // rank : (start + out.shape[0]) // rank]
    count = squares.shape[0]
    torch.bmm(weight.reshape(count, -1, rank), squares, out=out.view(count, -1, rank))
    out.view(count, rank, -1, rank).add_(squares[:, :, None, :])
