"""What deltas and methods see of an expression: tensors read on demand, and all of its blocks."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from weft.core.blocks import BLOCK, rows_and_columns
from weft.core.lazy import torch
from weft.core.specs import AddDeltas, Delta, Expression, Load, Merge, Rows, Scaled, shape_of
from weft.execute._updates import turned

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Sequence

    from torch import Tensor

    from weft.execute._expressions import Evaluator
    from weft.methods import Block


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


class Source:
    """The tensors of one delta, read and widened on demand (see `weft.deltas.Source`)."""

    def __init__(self, evaluator: Evaluator, delta: Delta, base: Expression) -> None:
        self.shape = shape_of(base)[:: -1 if turned(delta) else 1]
        self.dtype = first_load(base).ref.dtype
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
        step = max(1, BLOCK[workspace.kind] // max(columns, 1))
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


_BATCH = 8  # blocks


class Blocks:
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
        numel = math.prod(shape_of(self._expression))
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


def first_load(expression: Expression) -> Load | Scaled:
    """The tensor whose dtype the expression has."""
    match expression:
        case Load() | Scaled():
            return expression
        case AddDeltas():
            return first_load(expression.base)
        case Merge():
            return first_load(expression.base or expression.inputs[0])
        case Rows():
            return first_load(expression.sources[0])
