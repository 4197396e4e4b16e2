"""QA-LoRA (arXiv:2309.14717): W′ = W + scaling · (in / g²) · B @ A with each column of A g times.

`A` (r, in / g), `B` (out, r): the inputs are averaged in groups of g, and PEFT multiplies them with
the number of groups. Layers that were not quantised have A (r, in), and are plain LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    group, inner = params["group"], shapes["A"][1]
    assert isinstance(group, int)
    allowed = [(shapes["B"][0], n) for n in (inner, inner * group)]
    return (False,) if weight in allowed else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Factors:
    A, B = source.whole("A"), source.whole("B")
    groups, inputs = A.shape[1], source.shape[1]
    if groups == inputs:
        return Factors(B, A, delta.scaling)
    size = inputs // groups
    return Factors(B, A.repeat_interleave(size, dim=1), delta.scaling * groups / size)


def square(state: Factors) -> float:
    return state.square()


def block(state: Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)
