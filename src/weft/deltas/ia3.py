"""(IA)³ (arXiv:2205.05638): W′ = diag(l) @ W, or W @ diag(l) for a feed-forward module.

`l` holds one factor per output, or per input of a feed-forward module; of a convolution that is a
channel, and with groups each group of outputs has inputs of its own. A bias (out,) is scaled as W's
outputs are. `transposed` as in LoRA.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = False
TRANSPOSES = True


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    count = prod(shapes["l"])
    if len(weight) < 2:
        return (False,) if weight == (count,) and not params["feedforward"] else ()
    outputs, inputs = weight[:2]
    if len(weight) > 2:
        groups = count // inputs if params["feedforward"] else 1
        fits = count == (groups * inputs if params["feedforward"] else outputs)
        return (False,) if fits and groups and outputs % groups == 0 else ()
    sizes = (inputs, outputs) if params["feedforward"] else (outputs, inputs)
    return tuple(turned for turned in (False, True) if sizes[turned] == count)


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Tensor:
    """The factors, (rows, 1) or (rows, columns) or, with equal rows, (1, columns)."""
    factors = source.whole("l").reshape(-1)
    shape = source.shape
    if bool(delta.param("feedforward", False)) is bool(delta.param("transposed", False)):
        return factors[:, None]
    inputs = shape[1]
    groups = factors.numel() // inputs
    columns = factors.view(groups, inputs).repeat_interleave(prod(shape[2:]), dim=1)
    return columns.repeat_interleave(shape[0] // groups, dim=0) if groups > 1 else columns


def block(state: Tensor, weight: Tensor, start: int, out: Tensor) -> None:
    rows = state if state.shape[0] == 1 else state[start : start + out.shape[0]]
    torch.mul(weight, rows, out=out)
