"""UniLoRA (arXiv:2506.00799): W′ = W + B @ A, every element of both taken from one vector.

`theta` (d) is shared by all modules. A is theta[`indices_A`] · `scales_A`, (r, in), and B likewise
(out, r).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.deltas import _indices, _low_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("theta", "scales_A", "scales_B")
TRANSPOSES = True


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    factors = {"A": shapes["indices_A"], "B": shapes["indices_B"]}
    return _low_rank.orientations(factors, params, weight)


def prepare(delta: Delta, source: Source, blocks: Blocks) -> _low_rank.Factors:
    theta = source.whole("theta")
    A, B = (
        theta[_indices.load(delta, source, f"indices_{n}", len(theta))]
        * source.whole(f"scales_{n}")
        for n in "AB"
    )
    if delta.param("transposed", False):
        return _low_rank.Factors(A.T, B.T, 1.0)
    return _low_rank.Factors(B, A, 1.0)


def square(state: _low_rank.Factors) -> float:
    return state.square()


def block(state: _low_rank.Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)
