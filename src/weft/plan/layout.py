"""How a job's tensor is cut: the matrix that it is seen as, and which rows belong together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft import deltas, methods
from weft.core.blocks import rows_and_columns
from weft.core.specs import Expression, Load, Merge, TensorJob, children, deltas_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Layout:
    """How a job's tensor is cut.

    Attributes:
        rows, columns: The matrix that it is seen as.
        together: How many rows must stay in one piece; pieces begin at multiples of it.
    """

    rows: int
    columns: int
    together: int


def layout(job: TensorJob) -> Layout:
    """By rows, as its deltas and methods see it; or anywhere, if each element is for itself."""
    rows, columns = rows_and_columns(job.shape)
    if isinstance(job.expression, Load):
        return Layout(rows * columns, 1, 1)
    added = deltas_in(job.expression)
    if not added and len(job.shape) > 2:
        # Nothing sees dimension 0 as the rows: the experts of a layer would be too large for one.
        rows, columns = math.prod(job.shape[:-1]), job.shape[-1]
    together = 1
    for delta in added:
        own = deltas.kind(delta.kind)
        if hasattr(own, "matrix"):
            rows, columns = own.matrix(job.shape)
        if delta.param("transposed", False) and not deltas.transposes(delta.kind):
            together = 0
        elif hasattr(own, "together"):
            together = math.lcm(together, own.together(job.shape, dict(delta.params)))
    for each in merges(job):
        whole = methods.together(methods.method(each.method), job.shape)
        together = math.lcm(together, max(whole // max(columns, 1), 1))
    if len(job.shape) < 2 and any(methods.method(each.method).ROWS for each in merges(job)):
        together = 0
    return Layout(rows, columns, together or max(rows, 1))


def merges(job: TensorJob) -> list[Merge]:
    """Every use of a merge method in the job's expression."""

    def within(expression: Expression) -> Iterator[Merge]:
        for inner in children(expression):
            yield from within(inner)
        if isinstance(expression, Merge):
            yield expression

    return list(within(job.expression))


def shared_at_once(jobs: Sequence[TensorJob]) -> int:
    """How many shared factors to hold: of two layers, two parameters each, and all that last."""
    near = 4 * max((len(deltas_in(job.expression)) for job in jobs), default=1)
    return near + sum(forms for forms, _ in lasting(jobs).values())


def lasting(jobs: Iterable[TensorJob]) -> dict[tuple[str, int], tuple[int, int]]:
    """Factors that are used from the first layer to the last: (file, start) -> (forms, bytes)."""
    found = {}
    for job in jobs:
        for delta in deltas_in(job.expression):
            sizes = getattr(deltas.kind(delta.kind), "LASTING", {})
            for role, ref in delta.tensors:
                if role in sizes:
                    size = ref.numel * sum(sizes[role])
                    found[ref.file, ref.start] = len(sizes[role]), size
    return found


def scratch(job: TensorJob) -> int:
    """Bytes that the job's deltas take to be made ready, beside their tensors."""
    found = [(deltas.kind(delta.kind), job.shape) for delta in deltas_in(job.expression)]
    return sum(own.scratch(shape) for own, shape in found if hasattr(own, "scratch"))
