"""Rows of tuned − base. Where both are deltas on the same weights, the deltas are subtracted.

They are not added to a weight that would swallow part of them, which is then taken off again; also
where the rows of a vocabulary were put in another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.specs import AddDeltas, Expression, Rows
from weft.execute._updates import add_update, in_one_pass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from weft.core.specs import TensorRef
    from weft.execute._expressions import Evaluator

    Loaded = dict[TensorRef, Tensor]
    Parts = tuple[tuple[Expression, int], ...]  # what rows are the mean of: (whose, from which on)


def task_vector(
    evaluator: Evaluator,
    tuned: Expression,
    base: Expression,
    values: Tensor,
    start: int,
    stop: int,
    out: Tensor,
    path: str,
    loaded: Loaded,
) -> None:
    """Rows `start` to `stop` of tuned − base into `out`; `values` are those of the base."""
    if tuned == base:
        out.zero_()
        return
    if by_rows(tuned, base):
        rows_apart(evaluator, tuned, base, start, stop, out, path)
        return
    ours, theirs = _core(tuned), _core(base)
    if ours is tuned and theirs is base:
        evaluator.evaluate(tuned, start, stop, out, path)
        out.sub_(values)
        return
    below = values if theirs is base else evaluator.weight(theirs, start, stop, path, loaded)
    if ours == theirs:
        out.zero_()
    else:
        evaluator.evaluate(ours, start, stop, out, f"{path}c")
    above = below
    if ours != theirs and isinstance(tuned, AddDeltas):
        above = evaluator.buffer(f"{path}above", stop - start)
        above.copy_(out)
    if ours != theirs:
        out.sub_(below)
    add_update(evaluator, base, start, below, out, -1, path)
    add_update(evaluator, tuned, start, above, out, 1, path)


# ------------------------------------------------------------------------- rows in another order


def by_rows(tuned: Expression, base: Expression) -> bool:
    """Rows were rearranged, and deltas may be in them."""
    sources = [each.sources if isinstance(each, Rows) else (each,) for each in (tuned, base)]
    rearranged = isinstance(tuned, Rows) or isinstance(base, Rows)
    return rearranged and any(isinstance(s, AddDeltas) for each in sources for s in each)


def rows_apart(
    evaluator: Evaluator,
    tuned: Expression,
    base: Expression,
    start: int,
    stop: int,
    out: Tensor,
    path: str,
) -> None:
    """Rows `start` to `stop` of tuned − base, each a mean of rows of others, into `out`.

    Where both are the mean of the same rows, deltas aside, those cancel before anything is added.
    """
    for first, last, ours, theirs in _aligned(tuned, base, start, stop):
        rows = out[first - start : last - start]
        if ours is None or theirs is None:
            rows.copy_(evaluator.padding_apart(tuned, base))
            continue
        if _cores(ours) == _cores(theirs):
            rows.zero_()
        else:
            _mean(evaluator, _cores(ours), rows, path)
            other = evaluator.buffer(f"{path}other", len(rows))
            _mean(evaluator, _cores(theirs), other, path)
            rows.sub_(other)
        for sign, parts in ((-1, theirs), (1, ours)):
            for source, row in parts:
                _add_rows(evaluator, source, row, rows, sign / len(parts), path)


def _add_rows(
    evaluator: Evaluator, source: Expression, row: int, out: Tensor, factor: float, path: str
) -> None:
    """`out` += factor · ΣwᵢΔWᵢ, its rows from `row` on."""
    if not isinstance(source, AddDeltas):
        return
    weight = evaluator.buffer(f"{path}weight", len(out))
    if not in_one_pass(source):
        evaluator.evaluate(source.base, row, row + len(out), weight, f"{path}b")
    add_update(evaluator, source, row, weight, out, factor, path)


def _mean(evaluator: Evaluator, parts: Parts, out: Tensor, path: str) -> None:
    out.zero_()
    each = evaluator.buffer(f"{path}part", len(out))
    for source, row in parts:
        evaluator.evaluate(source, row, row + len(out), each, f"{path}c")
        out.add_(each, alpha=1 / len(parts))


def _aligned(
    tuned: Expression, base: Expression, start: int, stop: int
) -> Iterator[tuple[int, int, Parts | None, Parts | None]]:
    """Runs of rows that are made of the same parts throughout, of both."""
    ours, theirs = _runs(tuned, start, stop), _runs(base, start, stop)
    at, (until, mine), (until_too, yours) = start, next(ours), next(theirs)
    while True:
        last = min(until, until_too)
        yield at, last, mine, yours
        if last == stop:
            return
        mine, yours = _from(mine, last - at), _from(yours, last - at)
        at = last
        if last == until:
            until, mine = next(ours)
        if last == until_too:
            until_too, yours = next(theirs)


def _runs(expression: Expression, start: int, stop: int) -> Iterator[tuple[int, Parts | None]]:
    """Up to which row there are which parts, None for padding."""
    if not isinstance(expression, Rows):
        yield stop, ((expression, start),)
        return
    at = 0
    for run in expression.runs:
        first, last = max(start, at), min(stop, at + run.count)
        if first < last:
            yield last, tuple((expression.sources[n], row + first - at) for n, row in run.parts)
        at += run.count
    if at < stop:
        yield stop, None


def _from(parts: Parts | None, rows: int) -> Parts | None:
    return None if parts is None else tuple((source, row + rows) for source, row in parts)


def _cores(parts: Parts) -> Parts:
    return tuple((_core(source), row) for source, row in parts)


def _core(expression: Expression) -> Expression:
    """What deltas are added to."""
    return expression.base if isinstance(expression, AddDeltas) else expression
