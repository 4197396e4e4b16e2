"""WaveFT (arXiv:2505.12532): W′ = W + scaling · IDWT(C), C being zero but for some coefficients.

`spectrum` (n) holds those, at the first n places of a permutation of all that `seed` gives; with
`family` "" they are elements of ΔW themselves. Else C, widened evenly for the filter's overlap, is
one level of coefficients, in quarters: of both axes the first half is the smooth part, the second
the detail. (PEFT crosses the two mixed quarters: what lies in the right half of the columns is
detail of the rows, and the other way round.) W may be stored transposed.

The transform over the rows is done coefficient by coefficient, and only what falls into a block;
the one over the columns needs no other row.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas import _wavelets
from weft.deltas._places import places

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("spectrum",)
TRANSPOSES = True

Filters = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class State:
    """Coefficients after the transform over the rows, in the order of their row.

    Attributes:
        rows: Of ΔW, (m).
        places: Where they are then: band (smooth, detail) · width + column, (m).
        values: (m).
        width: Columns of a band.
        filters: Of the columns, smooth and detail; None if there is nothing left to transform.
    """

    rows: Tensor
    places: Tensor
    values: Tensor
    width: int
    filters: Filters | None


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    fits = len(weight) == 2 and shapes["spectrum"][0] <= prod(weight)
    return (False, True) if fits else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    values = source.whole("spectrum") * delta.scaling
    count, seed = len(values), int(delta.param("seed", 0))  # type: ignore[arg-type]
    if delta.param("transposed", False):
        columns, rows = places(*source.shape[::-1], count, seed)
    else:
        rows, columns = places(*source.shape, count, seed)
    rows, columns = rows.to(values.device), columns.to(values.device)
    if not (family := str(delta.param("family", ""))):
        rows, order = rows.sort()
        return State(rows, columns[order], values[order], source.shape[1], None)
    low = _wavelets.low_pass(family)
    filters = (low, _wavelets.high_pass(low))
    height, width = (_half(size, len(low)) for size in source.shape)
    rows = rows + (2 * height - source.shape[0]) // 2
    columns = columns + (2 * width - source.shape[1]) // 2
    # Each coefficient becomes as many as the filter is long, two rows apart from the next one's.
    taps = torch.tensor(filters, dtype=values.dtype, device=values.device)[columns // width]
    values = values[:, None] * taps
    targets = 2 * (rows % height)[:, None] + torch.arange(2 - len(low), 2, device=rows.device)
    inside = (targets >= 0) & (targets < source.shape[0])
    where = ((rows // height) * width + columns % width)[:, None].expand_as(targets)
    rows, order = targets[inside].sort()
    return State(rows, where[inside][order], values[inside][order], width, filters)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    edges = state.rows.new_tensor([start, start + out.shape[0]])
    here = slice(*torch.searchsorted(state.rows, edges).tolist())
    stride = state.width if state.filters is None else 2 * state.width
    bands = torch.zeros(out.shape[0], stride, dtype=out.dtype, device=out.device)
    into = (state.rows[here] - start) * stride + state.places[here]
    # (index_add_ adds in any order on a GPU)
    bands.view(-1).index_put_((into,), state.values[here], accumulate=True)
    if state.filters is None:
        out.copy_(bands)
        return
    out.zero_()
    for n, taps in enumerate(state.filters):
        band = bands[:, n * state.width : (n + 1) * state.width]
        for shift, tap in enumerate(taps, 2 - len(taps)):
            # Column j of the band reaches column 2j + shift of ΔW, where that is one.
            first, last = (1 - shift) // 2, (out.shape[1] - shift + 1) // 2
            first, last = max(first, 0), min(last, state.width)
            out[:, 2 * first + shift : 2 * last + shift : 2].add_(band[:, first:last], alpha=tap)


def _half(size: int, taps: int) -> int:
    """Coefficients of one half of an axis of ΔW, with what the filter takes off at the ends."""
    return (size + taps - 1) // 2
