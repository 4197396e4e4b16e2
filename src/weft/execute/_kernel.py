"""One job, block by block: the only place where byte ranges, deltas and (later) methods meet."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from weft import deltas
from weft.core.blocks import BLOCK, cut, rows_and_columns
from weft.core.errors import NumericsError
from weft.core.specs import AddDeltas, Delta, Expression, Load, TensorJob, leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from torch import Tensor

    from weft.deltas import DeltaKind
    from weft.execute._blocks import Files, Workspace


@dataclass(frozen=True, slots=True)
class Sums:
    """Over some rows: ‖W‖², ‖ΔW‖², ‖(W′ − W) − ΔW‖², and whether any element is not the base's."""

    base: float = 0.0
    delta: float = 0.0
    error: float = 0.0
    changed: bool = False

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.base + other.base,
            self.delta + other.delta,
            self.error + other.error,
            self.changed or other.changed,
        )


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

    def __init__(self, kernel: Kernel, delta: Delta) -> None:
        self.shape = kernel.job.shape[:: -1 if _turned(delta) else 1]
        self.dtype = leaves(kernel.job.expression)[0].dtype
        self._kernel = kernel
        self._refs = dict(delta.tensors)

    def whole(self, role: str) -> Tensor:
        ref = self._refs[role]
        rows, columns = rows_and_columns(ref.shape)
        workspace = self._kernel.workspace
        # Indices are numbers that no float32 need hold.
        floating = getattr(torch, ref.dtype).is_floating_point
        dtype = self._kernel.dtype if floating else torch.int64
        out = torch.empty(rows, columns, dtype=dtype, device=workspace.device)
        step = max(1, BLOCK[workspace.device.type] // max(columns, 1))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            workspace.load(self._kernel.files, ref, start, stop, out[start:stop])
        return out.view(ref.shape)

    def shared(self, role: str) -> Tensor:
        ref = self._refs[role]
        key = (ref.file, ref.start, ref.dtype, ref.shape, self._kernel.dtype)
        found = self._kernel.shared.get(key, lambda: self._load(role))
        self._kernel.keep(found)
        return found

    def _load(self, role: str) -> Tensor:
        values = self.whole(role)
        self._kernel.synchronise()  # other threads read it on their own streams
        return values

    def rows(self, role: str, start: int, stop: int, out: Tensor) -> None:
        self._kernel.workspace.load(self._kernel.files, self._refs[role], start, stop, out)


class Kernel:
    """A job made ready: small factors in memory, statistics taken.

    Blocks may then run in any order and in any thread; each uses its own buffers of `workspace`.
    """

    def __init__(self, job: TensorJob, files: Files, workspace: Workspace, shared: Shared) -> None:
        self.job = job
        self.files = files
        self.workspace = workspace
        self.shared = shared
        self._kept: list[Tensor] = []
        wide = {ref.dtype for ref in leaves(job.expression)} | {job.dtype}
        self.dtype = torch.float64 if "float64" in wide else torch.float32
        self.layout = deltas.layout(job)
        self._states: dict[int, tuple[DeltaKind, Any]] = {}
        self._prepare(job.expression)
        self._square = self._square_of(job.expression)
        self.synchronise()  # the factors are read on other threads' streams
        self._kept.clear()

    def synchronise(self) -> None:
        if self.workspace.stream is not None:
            self.workspace.stream.synchronize()

    def keep(self, values: Tensor) -> None:
        """Hold a shared tensor until all that reads it here is done."""
        self._kept.append(values)

    @property
    def closed_form(self) -> Sums:
        """What is known of the whole tensor without its blocks, and missing from their sums."""
        return Sums(delta=self._square or 0.0)

    def run(self, start: int, stop: int, offset: int) -> tuple[memoryview, Sums | None]:
        """Rows `start` to `stop`: their bytes, for the place `offset` of a file, and their sums.

        The bytes stay valid until this thread runs again.

        Raises:
            NumericsError: NaN or infinity, or an overflow of the output dtype.
        """
        dtype = getattr(torch, self.job.dtype)
        count = (stop - start) * self.layout.columns * dtype.itemsize
        host, raw = self.workspace.host("out", count, offset)
        out = host.view(dtype).view(stop - start, self.layout.columns)
        total: Sums | None = None
        for first, last in self._cut(start, stop):
            sums = self._block(first, last, out[first - start : last - start])
            total = total + sums if total and sums else sums
        return raw, total

    def _block(self, start: int, stop: int, out: Tensor) -> Sums | None:
        """Rows `start` to `stop`, rounded into `out` on the host."""
        shape = (stop - start, self.layout.columns)
        weight = self.workspace.compute("weight", *shape, self.dtype)
        if isinstance(self.job.expression, Load):
            self._evaluate(self.job.expression, start, stop, weight)
            self._check_cast(weight, self.workspace.narrow(weight, out))
            return None
        delta = self.workspace.compute("delta", *shape, self.dtype)
        value = self.workspace.compute("value", *shape, self.dtype)
        self._evaluate(self.job.expression.base, start, stop, weight)
        self._add_deltas(self.job.expression, start, weight, delta, value)
        return self._sums(weight, delta, value, self.workspace.narrow(value, out))

    def bytes_read(self, rows: int) -> int:
        """What `rows` rows of the output cost to read, the small factors aside."""
        count = self.layout.rows * self.layout.columns
        large = [ref for ref in leaves(self.job.expression) if ref.numel == count]
        return sum(rows * ref.nbytes // max(self.layout.rows, 1) for ref in large)

    def _cut(self, start: int, stop: int) -> list[tuple[int, int]]:
        layout, elements = self.layout, BLOCK[self.workspace.device.type]
        return cut(start, stop, layout.columns, elements, layout.together)

    # ------------------------------------------------------------------------------- expressions

    def _prepare(self, expression: Expression) -> None:
        if isinstance(expression, Load):
            return
        self._prepare(expression.base)

        def blocks(turned: bool) -> Iterator[tuple[int, Tensor]]:
            columns = self.layout.columns
            for first, last in self._cut(0, self.layout.rows):
                out = self.workspace.compute("weight", last - first, columns, self.dtype)
                self._evaluate(expression.base, first, last, out)
                yield first, out.T if turned else out

        for delta in expression.deltas:
            kind = deltas.kind(delta.kind)
            state = kind.prepare(delta, _Source(self, delta), partial(blocks, _turned(delta)))
            self._states[id(delta)] = (kind, state)

    def _square_of(self, expression: Expression) -> float | None:
        """‖ΔW‖² in closed form, where there is one."""
        if isinstance(expression, Load) or len(expression.deltas) != 1:
            return None
        kind, state = self._states[id(expression.deltas[0])]
        if not hasattr(kind, "square"):
            return None
        square = float(kind.square(state)) * expression.deltas[0].weight ** 2
        return square if math.isfinite(square) else None

    def _evaluate(self, expression: Expression, start: int, stop: int, out: Tensor) -> None:
        """Rows of any expression into `out`."""
        if isinstance(expression, Load):
            self.workspace.load(self.files, expression.ref, start, stop, out)
            return
        weight = torch.empty_like(out)
        self._evaluate(expression.base, start, stop, weight)
        self._add_deltas(expression, start, weight, torch.empty_like(out), out)

    def _add_deltas(
        self, expression: AddDeltas, start: int, weight: Tensor, delta: Tensor, value: Tensor
    ) -> None:
        """`value` = W + ΣwᵢΔWᵢ and `delta` = ΣwᵢΔWᵢ for the block `weight`."""
        first, *rest = expression.deltas
        kind, _state = self._states[id(first)]
        if not rest and first.weight == 1 and not kind.ADDITIVE:
            self._run_kind(first, start, weight, value)
            torch.sub(value, weight, out=delta)
            return
        if expression is self.job.expression and self._square == 0:
            delta.zero_()
            value.copy_(weight)  # and not W + 0, which makes +0 of −0
            return
        if rest and not all(self._states[id(each)][0].ADDITIVE for each in expression.deltas):
            # Several may take W's place together (0.7 and 0.3 of two heads). Where |W| ≫ |v|, v − W
            # loses v in float32; in float64 it keeps it, and is 0 still where v equals W.
            rows, columns = weight.shape
            total = self.workspace.compute("total", rows, columns, torch.float64).zero_()
            for each in expression.deltas:
                self._run_kind(each, start, weight, value)
                total.add_(value, alpha=each.weight)
                if not self._states[id(each)][0].ADDITIVE:
                    total.sub_(weight, alpha=each.weight)
            delta.copy_(total)
            value.copy_(total.add_(weight))
            return
        self._add_one(first, start, weight, delta)
        if first.weight != 1:
            delta.mul_(first.weight)
        for other in rest:
            self._add_one(other, start, weight, value)
            delta.add_(value, alpha=other.weight)
        torch.add(weight, delta, out=value)

    def _add_one(self, delta: Delta, start: int, weight: Tensor, out: Tensor) -> None:
        self._run_kind(delta, start, weight, out)
        if not deltas.kind(delta.kind).ADDITIVE:
            out.sub_(weight)

    def _run_kind(self, delta: Delta, start: int, weight: Tensor, out: Tensor) -> None:
        kind, state = self._states[id(delta)]
        if _turned(delta):
            weight, out = weight.T, out.T
        kind.block(state, weight, start, out)

    # ---------------------------------------------------------------------------------- the proof

    def _sums(self, weight: Tensor, delta: Tensor, value: Tensor, rounded: Tensor) -> Sums:
        """Take the sums of squares, and look closer if one of them is not finite."""
        written = self.workspace.compute("written", value.shape[0], value.shape[1], value.dtype)
        written.copy_(rounded)
        changed = not torch.equal(written, weight)
        # Not against W + ΔW as computed: that is rounded itself, by much of a small ΔW.
        error = written.sub_(weight).sub_(delta)
        update = 0.0 if self._square is not None else _square(delta)
        sums = Sums(_square(weight), update, _square(error), changed)
        if math.isfinite(sums.base + sums.delta + sums.error):
            return sums
        if not weight.isfinite().all():
            raise NumericsError(
                f"the base's {self.job.name} holds NaN or infinity", "check the base model's files"
            )
        if not delta.isfinite().all():
            raise NumericsError(
                f"the update of {self.job.name} is NaN or infinite", "check the adapter's factors"
            )
        self._check_cast(value, rounded)
        # Finite, but too large for the squares of this dtype: rare enough to do again in float64.
        wide = weight.double(), delta.double(), rounded.double()
        error = wide[2] - wide[0] - wide[1]
        update = 0.0 if self._square is not None else _square(wide[1])
        return Sums(_square(wide[0]), update, _square(error), changed)

    def _check_cast(self, exact: Tensor, rounded: Tensor) -> None:
        new = rounded.isinf() & ~exact.isinf()
        if new.any():
            largest = exact[new].abs().max().item()
            raise NumericsError(
                f"{self.job.name} overflows {self.job.dtype}: it reaches {largest:.4g}",
                "write --dtype bfloat16 or --dtype float32",
            )


def _turned(delta: Delta) -> bool:
    """W is stored (inputs, outputs), and the kind wants it the other way round."""
    return bool(delta.param("transposed", False)) and not deltas.transposes(delta.kind)


def _square(values: Tensor) -> float:
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))
