"""DoRA (arXiv:2402.09353): W′ = m / ‖V‖ · V with V = W + scaling · B @ A.

The norm runs over the input axis, one magnitude per output. Where W is stored (in, out) that is a
norm of columns, over all of W: a pass of statistics before the map. For Embedding the axis is the
vocabulary, one magnitude per hidden dimension, as PEFT trains it. The norm is that of this base:
a base in another precision than the adapter was trained on gives another W′.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas import _low_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = False
TRANSPOSES = True


@dataclass(frozen=True, slots=True)
class State:
    """The factors, and m (outputs); `factor` is m / ‖V‖ where it had to be taken beforehand."""

    factors: _low_rank.Factors
    magnitude: Tensor
    factor: Tensor | None


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    outputs = _low_rank.factor_shapes(shapes, params)[1][0]
    # PEFT ≤ 0.8-style files and convolutions keep axes of size 1; only the count matters.
    if (
        max(shapes["magnitude"], default=0) != outputs
        or sum(n != 1 for n in shapes["magnitude"]) > 1
    ):
        return ()
    return _low_rank.orientations(shapes, params, weight)


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    factors = _low_rank.load(delta, source)
    heads = delta.param("rotary_heads", 0)
    magnitude = _low_rank.in_halves(source.whole("magnitude").reshape(-1), heads)
    if not delta.param("transposed", False):
        return State(factors, magnitude, None)
    squares = torch.zeros(magnitude.shape, dtype=torch.float64, device=magnitude.device)
    for start, weight in blocks():
        V = torch.empty_like(weight)
        factors.product(start, V)
        V.add_(weight)
        squares += V.square_().sum(0, dtype=torch.float64)
    return State(factors, magnitude, magnitude / squares.sqrt().to(magnitude.dtype))


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    state.factors.product(start, out)
    out.add_(weight)
    if state.factor is not None:
        out.mul_(state.factor)
        return
    norm = torch.linalg.vector_norm(out, dim=1)
    out.mul_((state.magnitude[start : start + out.shape[0]] / norm)[:, None])
