"""Single elements of W trained: SHiRA (arXiv:2406.13175), Super-Tuning (arXiv:2607.09287).

W′ = W + scaling · Σ valueᵢ at indexᵢ. `values` (n); `indices` (2, n), rows and columns, or (n),
counted row by row. W is a matrix (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas import _indices

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("values",)


@dataclass(frozen=True, slots=True)
class State:
    """The elements in the order of their places, counted row by row."""

    places: Tensor
    values: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    return (False,) if len(weight) == 2 else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    rows, columns = source.shape
    if len(dict(delta.tensors)["indices"].shape) == 2:
        indices = _indices.load(delta, source, "indices", rows, columns)
        places = indices[0] * columns + indices[1]
    else:
        places = _indices.load(delta, source, "indices", rows * columns)
    places, order = places.sort()
    return State(places, source.whole("values")[order] * delta.scaling)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    columns = out.shape[1]
    edges = state.places.new_tensor([start * columns, (start + out.shape[0]) * columns])
    first, last = torch.searchsorted(state.places, edges).tolist()
    places = state.places[first:last] - start * columns
    out.zero_().view(-1).index_put_((places,), state.values[first:last], accumulate=True)
