"""C3A (arXiv:2407.19342): W′ = W + C / in, C being made of circulant b × b blocks.

`kernel` (out / b, in / b, b): the block in row i and column j has kernel[i, j, (p − t) mod b] in
its row t and column p. (PEFT computes it by Fourier transforms, in float32; these are the values.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("kernel",)


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    rows, columns, size = shapes["kernel"]
    return (False,) if weight == (rows * size, columns * size) else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Tensor:
    return source.whole("kernel")


def block(state: Tensor, weight: Tensor, start: int, out: Tensor) -> None:
    rows, columns, size = out.shape[0], *state.shape[1:]
    row = torch.arange(start, start + rows, device=out.device)
    place = (torch.arange(size, device=out.device) - row[:, None]) % size
    place = place[:, None, :].expand(rows, columns, size)
    torch.gather(state[row // size], 2, place, out=out.view(rows, columns, size))
    out.div_(out.shape[1])
