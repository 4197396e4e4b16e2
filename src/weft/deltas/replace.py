"""A full tensor in place of W: `modules_to_save`, trained biases, a saved embedding. W′ = value."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = False


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    return (False,) if shapes["value"] == weight else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Source:
    return source


def block(state: Source, weight: Tensor, start: int, out: Tensor) -> None:
    state.rows("value", start, start + out.shape[0], out)
