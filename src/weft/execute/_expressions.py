"""Expressions, block by block: the only place where byte ranges, deltas and methods meet."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weft import deltas, methods
from weft.core.blocks import BLOCK, cut, rows_and_columns
from weft.core.specs import AddDeltas, Delta, Expression, Load, Merge, Rows, shape_of
from weft.execute._task_vectors import (
    add_update,
    by_rows,
    in_one_pass,
    rows_apart,
    task_vector,
    turned,
)
from weft.methods import Block, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

    from torch import Tensor

    from weft.deltas import DeltaKind
    from weft.execute._blocks import Files, Workspace
    from weft.execute._task_vectors import Loaded


class Helpers(Protocol):
    """Threads that take a share of the work of making a tensor ready."""

    def map(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of `tasks`, in their order; several may run at once."""


class Shared:
    """Factors that several jobs use, widened: the last few of them.

    The experts of a layer follow each other in a checkpoint, and all of them use the same B.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._slots: OrderedDict[Hashable, _Slot] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], Tensor]) -> Tensor:
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            self._slots.move_to_end(key)
            while len(self._slots) > self._count:
                self._slots.popitem(last=False)
        with slot.lock:
            if slot.values is None:
                slot.values = load()
            return slot.values


@dataclass(slots=True)
class _Slot:
    values: Tensor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Source:
    """The tensors of one delta, read and widened on demand (see `weft.deltas.Source`)."""

    def __init__(self, evaluator: Evaluator, delta: Delta, base: Expression) -> None:
        self.shape = shape_of(base)[:: -1 if turned(delta) else 1]
        self.dtype = _first(base).ref.dtype
        self._evaluator = evaluator
        self._refs = dict(delta.tensors)

    def whole(self, role: str) -> Tensor:
        ref = self._refs[role]
        rows, columns = rows_and_columns(ref.shape)
        workspace = self._evaluator.workspace
        # Indices are numbers that no float32 need hold.
        floating = getattr(torch, ref.dtype).is_floating_point
        dtype = self._evaluator.dtype if floating else torch.int64
        out = torch.empty(rows, columns, dtype=dtype, device=workspace.device)
        step = max(1, BLOCK[workspace.device.type] // max(columns, 1))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            workspace.load(self._evaluator.files, ref, start, stop, out[start:stop])
        return out.view(ref.shape)

    def shared(self, role: str, make: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        ref = self._refs[role]
        key = (ref.file, ref.start, ref.dtype, ref.shape, self._evaluator.dtype, make)
        found = self._evaluator.shared.get(key, lambda: self._load(role, make))
        self._evaluator.keep(found)
        return found

    def _load(self, role: str, make: Callable[[Tensor], Tensor] | None) -> Tensor:
        values = make(self.shared(role)) if make else self.whole(role)
        self._evaluator.synchronise()  # other threads read it on their own streams
        return values

    def rows(self, role: str, start: int, stop: int, out: Tensor) -> None:
        evaluator = self._evaluator
        evaluator.workspace.load(evaluator.files, self._refs[role], start, stop, out)


class Evaluator:
    """The expression of a job made ready: small factors in memory, statistics taken.

    Blocks may then be evaluated in any order and in any thread; each uses its own buffers of
    `workspace`, whose names grow with the depth of the expression.
    """

    def __init__(
        self,
        expression: Expression,
        *,
        columns: int,
        together: int,
        dtype: torch.dtype,
        files: Files,
        workspace: Workspace,
        shared: Shared,
        helpers: Helpers,
    ) -> None:
        self.files = files
        self.workspace = workspace
        self.shared = shared
        self.dtype = dtype
        self.columns = columns
        self._together = together
        self._helpers = helpers
        self._kept: list[Tensor] = []
        self._states: dict[int, Any] = {}
        self._apart: dict[tuple[int, int], Tensor] = {}
        self._prepare(expression, "")
        self.synchronise()  # the factors are read on other threads' streams
        self._kept.clear()

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
        elements = BLOCK[self.workspace.device.type]
        return cut(start, stop, self.columns, elements, self._together)

    def buffer(self, name: str, rows: int) -> Tensor:
        return self.workspace.compute(name, rows, self.columns, self.dtype)

    # ------------------------------------------------------------------------------ made ready

    def _prepare(self, expression: Expression, path: str) -> None:
        match expression:
            case Load():
                return
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
                blocks = _Blocks(self, expression, self._helpers, path)
                self._states[id(expression)] = methods.prepare(own, task, blocks)
            case Rows():
                for number, each in enumerate(expression.sources):
                    self._prepare(each, f"{path}{number}.")
                self._states[id(expression)] = self._padding(expression, path)

    def _prepare_deltas(self, expression: AddDeltas, path: str) -> None:
        rows = shape_of(expression.base)
        count = torch.Size(rows).numel() // max(self.columns, 1)

        def blocks(turned: bool) -> Iterator[tuple[int, Tensor]]:
            for first, last in self.cut(0, count):
                out = self.buffer(f"{path}weight", last - first)
                self.evaluate(expression.base, first, last, out, f"{path}b")
                yield first, out.T if turned else out

        for delta in expression.deltas:
            source = _Source(self, delta, expression.base)
            kind = deltas.kind(delta.kind)
            self._states[id(delta)] = kind.prepare(delta, source, partial(blocks, turned(delta)))

    def _task(self, expression: Merge) -> Task:
        return Task(
            shape=shape_of(expression),
            columns=self.columns,
            count=len(expression.inputs),
            params=dict(expression.params),
            each=tuple(dict(params) for params in expression.each),
            key=expression.key,
        )

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
            case AddDeltas():
                weight = self.weight(expression.base, start, stop, path, loaded)
                if in_one_pass(expression):
                    add_update(self, expression, start, weight, out.copy_(weight), 1, path)
                    return
                delta = self.buffer(f"{path}delta", stop - start)
                self.add_deltas(expression, start, weight, delta, out)
            case Merge():
                out.copy_(self.merge(expression, start, stop, path)[0])
            case Rows():
                self._rows(expression, start, stop, out, path)

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

    def merge(
        self, expression: Merge, start: int, stop: int, path: str = ""
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of what a method makes, and the base's rows."""
        block = self.block(expression, start, stop, path)
        own = methods.method(expression.method)
        merged = own.block(self._task(expression), self._states[id(expression)], block)
        return merged, block.base

    def block(
        self, expression: Merge, start: int, stop: int, path: str, into: Tensor | None = None
    ) -> Block:
        """The rows that a method sees; those of the first input in `into`, if given."""
        base: Tensor | None = None
        loaded: Loaded = {}
        if expression.base:
            base = self.buffer(f"{path}base", stop - start)
            self.evaluate(expression.base, start, stop, base, f"{path}b")
            if isinstance(expression.base, Load):
                loaded[expression.base.ref] = base
        apart = methods.method(expression.method).TASK_VECTORS
        inputs = []
        for number, each in enumerate(expression.inputs):
            inner = f"{path}{number}."
            out = into if number == 0 else None
            if out is None:
                out = self.buffer(f"{path}{number}", stop - start)
            if apart and base is not None and expression.base:
                pair = (each, expression.base)
                task_vector(self, *pair, base, start, stop, out, inner, loaded)
            else:
                self.evaluate(each, start, stop, out, inner, loaded)
            inputs.append(out)
        return Block(start * self.columns, base, inputs)

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

    def add_deltas(
        self, expression: AddDeltas, start: int, weight: Tensor, delta: Tensor, value: Tensor
    ) -> None:
        """`value` = W + ΣwᵢΔWᵢ and `delta` = ΣwᵢΔWᵢ for the block `weight`."""
        if not self.update(expression, start, weight, delta, value):
            torch.add(weight, delta, out=value)

    def update(
        self, expression: AddDeltas, start: int, weight: Tensor, delta: Tensor, value: Tensor
    ) -> bool:
        """`delta` = ΣwᵢΔWᵢ for the block `weight`; true if `value` is W + ΣwᵢΔWᵢ already."""
        first, *rest = expression.deltas
        additive = deltas.kind(first.kind).ADDITIVE
        if not rest and first.weight == 1 and not additive:
            self._run_kind(first, start, weight, value)
            torch.sub(value, weight, out=delta)
            return True
        if rest and not all(deltas.kind(each.kind).ADDITIVE for each in expression.deltas):
            # Several may take W's place together (0.7 and 0.3 of two heads). Where |W| ≫ |v|, v − W
            # loses v in float32; in float64 it keeps it, and is 0 still where v equals W.
            rows, columns = weight.shape
            total = self.workspace.compute("total", rows, columns, torch.float64).zero_()
            for each in expression.deltas:
                self._run_kind(each, start, weight, value)
                total.add_(value, alpha=each.weight)
                if not deltas.kind(each.kind).ADDITIVE:
                    total.sub_(weight, alpha=each.weight)
            delta.copy_(total)
            value.copy_(total.add_(weight))
            return True
        self._add_one(first, start, weight, delta)
        if first.weight != 1:
            delta.mul_(first.weight)
        for other in rest:
            self._add_one(other, start, weight, value)
            delta.add_(value, alpha=other.weight)
        return False

    def _add_one(self, delta: Delta, start: int, weight: Tensor, out: Tensor) -> None:
        self._run_kind(delta, start, weight, out)
        if not deltas.kind(delta.kind).ADDITIVE:
            out.sub_(weight)

    def _run_kind(self, delta: Delta, start: int, weight: Tensor, out: Tensor) -> None:
        kind, state = self.state(delta)
        if turned(delta):
            weight, out = weight.T, out.T
        kind.block(state, weight, start, out)


_BATCH = 8  # blocks


class _Blocks:
    """All blocks of a `Merge` (see `weft.methods.Blocks`)."""

    def __init__(
        self, evaluator: Evaluator, expression: Merge, helpers: Helpers, path: str
    ) -> None:
        self._evaluator = evaluator
        self._expression = expression
        self._helpers = helpers
        self._path = path

    def map(
        self,
        function: Callable[[Block], Any],
        sample: int | None = None,
        only: Collection[int] | None = None,
    ) -> list[Any]:
        numel = torch.Size(shape_of(self._expression)).numel()
        pieces = self._evaluator.cut(0, numel // max(self._evaluator.columns, 1))
        if sample is not None and sample < numel:
            pieces = _sampled(pieces, sample / numel)
        if only is not None:
            pieces = [piece for number, piece in enumerate(pieces) if number in only]

        def some(pieces: Sequence[tuple[int, int]]) -> list[Any]:
            blocks = (self._evaluator.block(self._expression, *each, self._path) for each in pieces)
            return [function(block) for block in blocks]

        # Several to a task: threads that hand over to each other after every block get less done.
        tasks = [partial(some, pieces[at : at + _BATCH]) for at in range(0, len(pieces), _BATCH)]
        return [found for each in self._helpers.map(tasks) for found in each]


def _sampled(pieces: list[tuple[int, int]], share: float) -> list[tuple[int, int]]:
    """Of every piece the first rows."""
    return [(start, start + max(1, int((stop - start) * share))) for start, stop in pieces]


def _first(expression: Expression) -> Load:
    """The tensor whose dtype the expression has."""
    match expression:
        case Load():
            return expression
        case AddDeltas():
            return _first(expression.base)
        case Merge():
            return _first(expression.base or expression.inputs[0])
        case Rows():
            return _first(expression.sources[0])
