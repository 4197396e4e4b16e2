"""BEFT (arXiv:2509.15974): b′ = b + beft_bias, (1, out)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("bias",)


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    return (False,) if shapes["bias"] == (1, *weight) else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Tensor:
    return source.whole("bias").T


def block(state: Tensor, weight: Tensor, start: int, out: Tensor) -> None:
    out.copy_(state[start : start + out.shape[0]])
