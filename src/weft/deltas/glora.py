"""GLoRA (arXiv:2306.07967), the weight: W′ = W + W ⊙ A + B.

A and B each are a product, `A_left` (out, r) and `A_right` (r, in), or `A`: a factor for each
output (out, 1), for all (1), or a matrix like W. What happens to the bias is in `glora_bias`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas import _paths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    fit = len(weight) == 2 and all(_paths.fits(shapes, name, weight) for name in "AB")
    return (False,) if fit else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> tuple[_paths.Path, _paths.Path]:
    return _paths.load(delta, source, "A"), _paths.load(delta, source, "B")


def block(state: tuple[_paths.Path, _paths.Path], weight: Tensor, start: int, out: Tensor) -> None:
    A, B = (path.rows(start, weight) for path in state)
    torch.mul(weight, A, out=out).add_(B)
