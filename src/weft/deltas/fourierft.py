"""FourierFT (arXiv:2405.03003): W′ = W + scaling · Re(ifft2(F)), F being zero but for some entries.

`spectrum` (n) holds those, at the first n places of a permutation of all that `seed` gives. W may
be stored transposed. A block of rows needs no other: of each it takes, entry by entry, what the
transform over the rows makes of it, and transforms the columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, tau
from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas._places import places

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("spectrum",)
TRANSPOSES = True
_PHASES = 2**20  # how many are in memory at a time


@dataclass(frozen=True, slots=True)
class State:
    """The entries of F (n) with their rows and columns, and the roots of unity (rows), scaled."""

    spectrum: Tensor
    rows: Tensor
    columns: Tensor
    roots: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    fits = len(weight) == 2 and shapes["spectrum"][0] <= prod(weight)
    return (False, True) if fits else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    spectrum = source.whole("spectrum")
    count, seed = len(spectrum), int(delta.param("seed", 0))  # type: ignore[arg-type]
    if delta.param("transposed", False):
        columns, rows = places(*source.shape[::-1], count, seed)
    else:
        rows, columns = places(*source.shape, count, seed)
    # In float64 first: an angle of float32 is off by more than its cosine may be.
    angles = torch.arange(source.shape[0], dtype=torch.float64) * (tau / source.shape[0])
    roots = torch.polar(torch.full_like(angles, delta.scaling / prod(source.shape)), angles)
    roots = roots.to(spectrum.device, spectrum.dtype.to_complex())
    return State(spectrum, rows.to(spectrum.device), columns.to(spectrum.device), roots)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    own = torch.arange(out.shape[0], device=out.device)[:, None]
    half = torch.zeros(out.shape, dtype=state.roots.dtype, device=out.device)
    step = max(1, _PHASES // out.shape[0])
    for first in range(0, len(state.spectrum), step):
        some = slice(first, first + step)
        phases = state.roots[(own + start) * state.rows[some] % len(state.roots)]
        # (index_add_ adds in any order on a GPU)
        into, values = (own, state.columns[some]), phases * state.spectrum[some]
        half.index_put_(into, values, accumulate=True)
    out.copy_(torch.fft.ifft(half, dim=1, norm="forward").real)
