"""Expressions, block by block: the only place where byte ranges, deltas and methods meet."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from weft import deltas, methods
from weft.core.blocks import BLOCK, COMPILED, cut
from weft.core.lazy import torch
from weft.core.specs import AddDeltas, Delta, Expression, Load, Merge, Rows, Scaled, shape_of
from weft.execute._loops import compiled
from weft.execute._operands import Reader
from weft.execute._scales import scales, spread
from weft.execute._sources import Blocks, Helpers, Shared, Source
from weft.execute._task_vectors import by_rows, rows_apart
from weft.execute._updates import add_deltas, add_update, in_one_pass, turned
from weft.methods import Block, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from weft.deltas import DeltaKind
    from weft.execute._blocks import Files, Workspace
    from weft.execute._held import Held
    from weft.execute._task_vectors import Loaded
    from weft.native import Flat, Proof

__all__ = ["Evaluator", "Helpers", "Shared"]


def task_of(expression: Merge, columns: int) -> Task:
    """What the method is told of a tensor."""
    return Task(
        shape=shape_of(expression),
        columns=columns,
        count=len(expression.inputs),
        params=dict(expression.params),
        each=tuple(dict(params) for params in expression.each),
        key=expression.key,
    )


class Evaluator:
    """The expression of a job made ready: small factors in memory, statistics taken.

    Blocks may then be evaluated in any order and in any thread; each uses its own buffers of
    `workspace`, whose names grow with the depth of the expression. Those of compiled loops are
    `times` as large.
    """

    def __init__(
        self,
        expression: Expression,
        *,
        columns: int,
        together: int,
        dtype: str,
        files: Files,
        workspace: Workspace,
        shared: Shared,
        helpers: Helpers,
        held: Held | None = None,
        times: int = COMPILED,
    ) -> None:
        self.held = held
        self.files = files
        self.workspace = workspace
        self.shared = shared
        self._dtype = dtype
        # Whether compiled loops do the arithmetic, of dtypes that they read.
        self.compiles = dtype == "float32" and compiled(workspace.kind)
        self._times = times if self.compiles and isinstance(expression, Merge) else 1
        self.columns = columns
        self._together = together
        self._helpers = helpers
        self._kept: list[Tensor] = []
        self._states: dict[int, Any] = {}
        self._tasks: dict[int, Task] = {}
        self._apart: dict[tuple[int, int], Tensor] = {}
        self._prepare(expression, "")
        self.synchronise()  # the factors are read on other threads' streams
        self._kept.clear()

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return getattr(torch, self._dtype)  # type: ignore[no-any-return]

    def synchronise(self) -> None:
        if self.workspace.stream is not None:
            self.workspace.stream.synchronize()

    def keep(self, values: Tensor) -> None:
        """Hold a shared tensor until all that reads it here is done."""
        self._kept.append(values)

    def state(self, delta: Delta) -> tuple[DeltaKind, Any]:
        """The kind of a delta, and what it prepared."""
        return deltas.kind(delta.kind), self._states[id(delta)]

    def cut(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows in blocks."""
        elements = BLOCK[self.workspace.kind] * self._times
        return cut(start, stop, self.columns, elements, self._together)

    def buffer(self, name: str, rows: int) -> Tensor:
        return self.workspace.compute(name, rows, self.columns, self.dtype)

    # ------------------------------------------------------------------------------ made ready

    def _prepare(self, expression: Expression, path: str) -> None:
        match expression:
            case Load():
                return
            case Scaled():
                self._states[id(expression)] = scales(expression, self)
            case AddDeltas():
                self._prepare(expression.base, f"{path}b")
                self._prepare_deltas(expression, path)
            case Merge():
                if expression.base:
                    self._prepare(expression.base, f"{path}b")
                for number, each in enumerate(expression.inputs):
                    self._prepare(each, f"{path}{number}.")
                self._prepare_padding(expression, path)
                own, task = methods.method(expression.method), self._task(expression)
                blocks = Blocks(self, expression, self._helpers, path)
                self._states[id(expression)] = methods.prepare(own, task, blocks)
            case Rows():
                for number, each in enumerate(expression.sources):
                    self._prepare(each, f"{path}{number}.")
                self._states[id(expression)] = self._padding(expression, path)

    def _prepare_deltas(self, expression: AddDeltas, path: str) -> None:
        rows = shape_of(expression.base)
        count = math.prod(rows) // max(self.columns, 1)

        def blocks(turned: bool) -> Iterator[tuple[int, Tensor]]:
            for first, last in self.cut(0, count):
                out = self.buffer(f"{path}weight", last - first)
                self.evaluate(expression.base, first, last, out, f"{path}b")
                yield first, out.T if turned else out

        for delta in expression.deltas:
            source = Source(self, delta, expression.base)
            kind = deltas.kind(delta.kind)
            self._states[id(delta)] = kind.prepare(delta, source, partial(blocks, turned(delta)))

    def _task(self, expression: Merge) -> Task:
        if id(expression) not in self._tasks:
            self._tasks[id(expression)] = task_of(expression, self.columns)
        return self._tasks[id(expression)]

    def _padding(self, expression: Rows, path: str) -> Tensor | None:
        """The mean of all rows, if any row holds it."""
        if not expression.padding:
            return None
        count = sum(run.count for run in expression.runs)
        return self._mean_row(count, partial(self._rows, expression, path=path), path)

    def _prepare_padding(self, expression: Merge, path: str) -> None:
        """The mean of all rows of each task vector, where rows are to hold it."""
        base = expression.base
        if not isinstance(base, Rows) or not base.padding:
            return
        count = sum(run.count for run in base.runs)
        for number, each in enumerate(expression.inputs):
            if by_rows(each, base):
                rows = partial(rows_apart, self, each, base, path=f"{path}{number}.")
                mean = self._mean_row(count, rows, f"{path}{number}.mean")
                self._apart[id(each), id(base)] = mean

    def padding_apart(self, tuned: Expression, base: Expression) -> Tensor:
        """What the rows of padding of a task vector hold."""
        return self._apart[id(tuned), id(base)]

    def _mean_row(self, count: int, rows: Callable[[int, int, Tensor], None], path: str) -> Tensor:
        total = torch.zeros(self.columns, dtype=torch.float64, device=self.workspace.device)
        for first, last in self.cut(0, count):
            out = self.buffer(f"{path}weight", last - first)
            rows(first, last, out)
            total += out.sum(0, dtype=torch.float64)
        return (total / max(count, 1)).to(self.dtype)

    # -------------------------------------------------------------------------------- evaluated

    def evaluate(
        self,
        expression: Expression,
        start: int,
        stop: int,
        out: Tensor,
        path: str = "",
        loaded: Loaded | None = None,
    ) -> None:
        """Rows `start` to `stop` of any expression into `out`.

        `loaded`: these rows of tensors that are in memory, or will be.
        """
        match expression:
            case Load():
                self.workspace.load(self.files, expression.ref, start, stop, out)
            case Scaled():
                self.workspace.load(self.files, expression.ref, start, stop, out)
                out.mul_(self.scales(expression, start, stop))
            case AddDeltas():
                weight = self.weight(expression.base, start, stop, path, loaded)
                if in_one_pass(expression):
                    add_update(self, expression, start, weight, out.copy_(weight), 1, path)
                    return
                delta = self.buffer(f"{path}delta", stop - start)
                add_deltas(self, expression, start, weight, delta, out)
            case Merge():
                block = self.block(expression, start, stop, path)
                if self.compiled(expression, block, out.view(-1)) is None:
                    out.copy_(self.merged(expression, block))
            case Rows():
                self._rows(expression, start, stop, out, path)

    def scales(self, expression: Scaled, start: int, stop: int) -> Tensor:
        """Of rows `start` to `stop`, (stop − start, columns), or one column for all of them."""
        return spread(self._states[id(expression)], expression.block, start, stop, self.columns)

    def weight(
        self, base: Expression, start: int, stop: int, path: str, loaded: Loaded | None
    ) -> Tensor:
        """Rows of what deltas are added to; several models may stand on the same weights."""
        if loaded is not None and isinstance(base, Load) and base.ref in loaded:
            return loaded[base.ref]
        weight = self.buffer(f"{path}weight", stop - start)
        self.evaluate(base, start, stop, weight, f"{path}b")
        if loaded is not None and isinstance(base, Load):
            loaded[base.ref] = weight
        return weight

    def merged(self, expression: Merge, block: Block) -> Tensor:
        """What a method makes of a block, which may be written over."""
        own = methods.method(expression.method)
        return methods.merged(own, self._task(expression), self._states[id(expression)], block)

    def compiled(self, expression: Merge, block: Block, out: Flat) -> Proof | None:
        """The same, rounded into `out` by compiled loops, if there are any for it."""
        own = methods.method(expression.method)
        state = self._states[id(expression)]
        return methods.compiled(own, self._task(expression), state, block, out)

    def block(
        self, expression: Merge, start: int, stop: int, path: str, into: Tensor | None = None
    ) -> Block:
        """The rows that a method sees; those of the first input in `into`, if given."""
        return Reader(self, start, stop).block(expression, path, into)

    def _rows(self, expression: Rows, start: int, stop: int, out: Tensor, path: str) -> None:
        at = 0
        for run in expression.runs:
            first, last = max(start, at), min(stop, at + run.count)
            if first < last:
                rows = out[first - start : last - start]
                self._mean(expression, run.parts, first - at, last - at, rows, path)
            at += run.count
        if stop > at:
            out[max(start, at) - start :] = self._states[id(expression)]

    def _mean(
        self,
        expression: Rows,
        parts: tuple[tuple[int, int], ...],
        start: int,
        stop: int,
        out: Tensor,
        path: str,
    ) -> None:
        """Rows `start` to `stop` of a run."""
        if not parts:
            out.zero_()
        for number, (source, first) in enumerate(parts):
            into = out if number == 0 else self.buffer(f"{path}mean", stop - start)
            inner = expression.sources[source]
            self.evaluate(inner, first + start, first + stop, into, f"{path}{source}.")
            if number:
                out.add_(into)
        if len(parts) > 1:
            out.div_(len(parts))
