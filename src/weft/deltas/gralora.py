"""GraLoRA (arXiv:2505.20355): W is cut into k × k blocks, each with a LoRA of rank r / k.

`A_blocks` (k, in / k, r), `B_blocks` (k, r, out / k). The block in row j and column n takes the
n-th part of B_blocks[j] and the j-th part of A_blocks[n], parts being r / k of the rank:
ΔW[j, n] = scaling · (A_blocks[n][:, j-th] @ B_blocks[j][n-th])ᵀ. A hybrid adds scaling · B @ A over
all of W, `A` (h, in), `B` (out, h). `transposed` as in LoRA.
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

ADDITIVE = True
TRANSPOSES = True


@dataclass(frozen=True, slots=True)
class State:
    """`left` (k, rows / k, r), `right` (k, r, columns / k), and what covers all of W."""

    left: Tensor
    right: Tensor
    whole: tuple[Tensor, Tensor] | None
    scaling: float


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    count, inner, _rank = shapes["A_blocks"]
    size = (count * shapes["B_blocks"][2], count * inner)
    fits = _low_rank.orientations(shapes, params, weight) if "A" in shapes else (False, True)
    return tuple(turned for turned in fits if weight == (size[::-1] if turned else size))


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    A, B = source.whole("A_blocks"), source.whole("B_blocks")
    whole = None
    if any(role == "A" for role, _ in delta.tensors):
        whole = source.whole("B"), source.whole("A")
    if delta.param("transposed", False):
        whole = (whole[1].T, whole[0].T) if whole else None
        return State(A, B, whole, delta.scaling)
    return State(B.transpose(1, 2), A.transpose(1, 2), whole, delta.scaling)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    count, height, rank = state.left.shape
    width, part = state.right.shape[2], rank // count
    stop = start + out.shape[0]
    for j in range(start // height, -(-stop // height)):
        first, last = max(start, j * height), min(stop, (j + 1) * height)
        rows = state.left[j, first - j * height : last - j * height]
        for n in range(count):
            torch.mm(
                rows[:, n * part : (n + 1) * part],
                state.right[n, j * part : (j + 1) * part],
                out=out[first - start : last - start, n * width : (n + 1) * width],
            )
    if state.whole:
        left, right = state.whole
        out.addmm_(left[start:stop], right)
    out.mul_(state.scaling)
