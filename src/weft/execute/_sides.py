"""The bytes of a tensor in any range: as they lie on disk, or as a merge would write them.

No torch is loaded unless something has to be computed.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from weft.core.dtypes import itemsize
from weft.core.specs import Load

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from weft.core.specs import TensorJob
    from weft.execute._files import Files
    from weft.execute._kernel import Kernel

    Raw = NDArray[np.uint8]
    Values = NDArray[np.floating[Any]]

# What numpy has no name for is read as the integers of its bits.
_NATIVE = {"bfloat16": "u2", "bool": "u1", "complex64": "f4"}
FLOATING = ("bfloat16", "float16", "float32")  # whose differences are taken in float32


class Buffers(threading.local):
    """Each thread's own arrays, made once and reused."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[Any]] = {}

    def get(self, slot: str, count: int, dtype: str) -> NDArray[Any]:
        """An uninitialised array."""
        key = f"{slot} {dtype}"
        if key not in self._held or self._held[key].size < count:
            self._held[key] = np.empty(count, dtype)
        return self._held[key][:count]


class Side(Protocol):
    """One tensor of one model.

    Attributes:
        dtype: As torch spells it.
        unit: Elements that must be taken together: ranges begin at multiples of it.
    """

    dtype: str
    unit: int

    def read(self, start: int, stop: int) -> Raw:
        """The bytes of elements `start` to `stop`, valid until this thread reads again."""

    def rest(self) -> None:
        """Let go of what was made ready; it is made again if need be."""


class Stored:
    """Bytes that lie on disk."""

    unit = 1

    def __init__(self, job: TensorJob, slot: str, files: Files, buffers: Buffers) -> None:
        assert isinstance(job.expression, Load)
        self.dtype = job.dtype
        self.ref = job.expression.ref
        self._slot, self._files, self._buffers = slot, files, buffers

    def read(self, start: int, stop: int) -> Raw:
        size = itemsize(self.dtype)
        raw = self._buffers.get(self._slot, (stop - start) * size, "u1")
        self._files.read(self.ref.file, self.ref.start + start * size, raw.data)
        return raw

    def rest(self) -> None:
        pass


class _Alone:
    """No helpers: whoever makes a tensor ready does all of it."""

    def map(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        return [task() for task in tasks]


class _Computed:
    """Bytes that a merge would write."""

    def __init__(self, job: TensorJob, make: Callable[[TensorJob], Kernel]) -> None:
        from weft.plan.layout import layout

        form = layout(job)
        self.dtype = job.dtype
        self.unit = form.columns * form.together
        self._columns = form.columns
        self._job, self._make = job, make
        self._kernel: Kernel | None = None
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> Raw:
        with self._lock:
            kernel = self._kernel = self._kernel or self._make(self._job)
        raw, _ = kernel.run(start // self._columns, stop // self._columns, 0)
        return np.frombuffer(raw, np.uint8)

    def rest(self) -> None:
        with self._lock:
            self._kernel = None


class Model:
    """What all tensors of one side share; no two sides share their buffers."""

    def __init__(self, slot: str, jobs: Sequence[TensorJob], files: Files) -> None:
        self._slot, self._files, self._buffers = slot, files, Buffers()
        self._make: Callable[[TensorJob], Kernel] | None = None
        computed = [job for job in jobs if not job.is_copy]
        if computed:
            self._make = _kernels(computed, files)

    @property
    def computes(self) -> bool:
        """Some tensor has to be computed, which takes torch."""
        return self._make is not None

    def side(self, job: TensorJob) -> Side:
        if job.is_copy:
            return Stored(job, self._slot, self._files, self._buffers)
        assert self._make is not None
        return _Computed(job, self._make)


def _kernels(jobs: Sequence[TensorJob], files: Files) -> Callable[[TensorJob], Kernel]:
    from weft.execute._blocks import Workspace
    from weft.execute._expressions import Shared
    from weft.execute._kernel import Kernel
    from weft.plan.layout import shared_at_once

    workspace, shared = Workspace(), Shared(shared_at_once(jobs))
    return lambda job: Kernel(job, files, workspace, shared, _Alone())


# ------------------------------------------------------------------------------------------ values


def native(raw: Raw, dtype: str) -> NDArray[Any]:
    """The bytes as numpy sees them: numbers (of a complex one, two), or the bits of others."""
    name = _NATIVE.get(dtype, "u1" if dtype.startswith("float8") else dtype)
    return raw.view(np.dtype(name).newbyteorder("<"))


def widen(raw: Raw, dtype: str, out: Values) -> Values:
    """The values of `raw`, in the float32 or float64 of `out`."""
    values = native(raw, dtype)
    if dtype == "bfloat16":
        if out.dtype == np.float32:
            bits = out.view(np.uint32)
            np.copyto(bits, values)
            np.left_shift(bits, 16, out=bits)
        else:
            np.copyto(out, (values.astype(np.uint32) << 16).view(np.float32))
    elif dtype.startswith("float8"):
        np.copyto(out, _eighths(dtype)[values])
    else:
        np.copyto(out, values, casting="unsafe")
    return out


def working(one: str, other: str) -> str:
    """The dtype in which the difference of two dtypes is taken."""
    narrow = all(d in FLOATING or d.startswith(("float8", "complex")) for d in (one, other))
    return "f4" if narrow else "f8"


_TABLES: dict[str, Any] = {}


def _eighths(dtype: str) -> Any:
    """The 256 values of a float8."""
    if dtype not in _TABLES:
        import torch

        codes = torch.arange(256, dtype=torch.uint8)
        _TABLES[dtype] = codes.view(getattr(torch, dtype)).to(torch.float32).numpy()
    return _TABLES[dtype]
