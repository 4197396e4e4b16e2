"""LoRA on parts of a fused matrix, PEFT 0.1 and 0.2's MergedLinear: W′ = W + scaling · P · B @ A.

W's rows (queries, keys, values) are parts of one length; `parts` says which of the n have factors,
and P puts those rows at their place, zeros elsewhere. `A` (m · r, in) for m such parts. `B`
(out · m / n, m · r / g) or (…, 1) is the weight of a convolution with g groups: of g blocks along a
diagonal these are the rows, one block under the other.
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
TRANSPOSES = True


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    parts = _parts(params["parts"])
    full = (shapes["B"][0] // sum(parts) * len(parts), shapes["A"][1])
    return tuple(turned for turned in (False, True) if weight == (full[::-1] if turned else full))


def _parts(value: Param) -> tuple[int, ...]:
    assert isinstance(value, tuple)
    return tuple(map(int, value))


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Factors:
    parts = _parts(delta.param("parts", ()))
    A = source.whole("A")
    B = source.whole("B").flatten(1)
    groups = A.shape[0] // B.shape[1]
    diagonal: Tensor = torch.block_diag(*B.chunk(groups))  # type: ignore[no-untyped-call]
    length = B.shape[0] // sum(parts)
    full = B.new_zeros(length * len(parts), A.shape[0])
    enabled = torch.tensor(parts, dtype=torch.bool, device=B.device).repeat_interleave(length)
    full[enabled] = diagonal
    if delta.param("transposed", False):
        return Factors(A.T, full.T, delta.scaling)
    return Factors(full, A, delta.scaling)


def square(state: Factors) -> float:
    return state.square()


def block(state: Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)
