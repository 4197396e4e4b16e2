"""How many directions a difference has: its stable rank, from a few passes over both models.

‖D‖_F² / ‖D‖₂² (Rudelson & Vershynin, "Sampling from large matrices", J. ACM 54(4), 2007) is 1 for
one direction, r for r equal ones, and at most the rank; the roundings of a narrow dtype, spread
over all directions, hardly move it. ‖D‖_F² is known from the comparison. ‖D‖₂² is the largest Ritz
value of DᵀD in a block Krylov space (Musco & Musco, "Randomized block Krylov methods", 2015), for
which each pass needs the rows once, a few at a time: Σ Dᵢᵀ(Dᵢ Q). It comes from below: to the digit
where D has a few strong directions, within some percent where all are alike.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from weft.execute import compare
from weft.execute._difference import difference
from weft.execute._sides import Buffers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weft.core.specs import Shape
    from weft.execute._difference import Sums
    from weft.execute.compare import Two, Work

_WIDTH = 8  # vectors at a time
_PASSES = 6  # over the difference at most
_SETTLED = 0.005  # relative growth of the Ritz value in one pass


def stable_ranks(
    pairs: Sequence[Two], works: Sequence[Work], totals: Sequence[Sums], threads: int
) -> list[float | None]:
    """Of every matrix that differs and is finite; one thread takes a matrix."""
    buffers = Buffers()
    found: list[float | None] = [None] * len(works)

    def one(number: int) -> None:
        work, total = works[number], totals[number]
        square = _spectral(work, pairs[number][0].shape, 1 / total.largest, buffers)
        frobenius = total.difference / total.largest**2
        found[number] = max(frobenius / square, 1.0)
        work.a.rest()
        work.b.rest()

    chosen = [
        number
        for number, total in enumerate(totals)
        if len(pairs[number][0].shape) == 2 and total.largest and total.not_finite == (0, 0)
        if works[number].a.dtype != "complex64"
    ]
    chosen.sort(key=lambda number: -works[number].count)
    compare.each((partial(one, number) for number in chosen), threads, torch=True)
    return found


def _spectral(work: Work, shape: Shape, scale: float, buffers: Buffers) -> float:
    """‖D · scale‖₂², D (rows, columns)."""
    rows, columns = shape
    ranges = compare.pieces(work.a, work.b, work.count, columns)

    def gram(Q: Tensor) -> Tensor:
        """DᵀD Q, (columns, width) in float64."""
        narrow, total = Q.float(), torch.zeros_like(Q)
        for start, stop in ranges:
            a, b = work.a.read(start, stop), work.b.read(start, stop)
            D = torch.from_numpy(difference(a, b, work.dtypes, buffers, scale)).view(-1, columns)
            total += D.T @ (D @ narrow)
        return total

    width = min(_WIDTH, rows, columns)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    space, images, largest = torch.empty(columns, 0, dtype=torch.float64), [], 0.0
    Q = torch.linalg.qr(start).Q
    for _ in range(_PASSES):
        space = torch.cat([space, Q], dim=1)
        images.append(gram(Q))
        T = space.T @ torch.cat(images, dim=1)
        before, largest = largest, float(torch.linalg.eigvalsh((T + T.T) / 2)[-1])
        if largest <= before * (1 + _SETTLED) or space.shape[1] + width > columns:
            break
        rest = images[-1]
        for _ in range(2):  # twice is enough
            rest = rest - space @ (space.T @ rest)
        Q = torch.linalg.qr(rest).Q
    return largest
