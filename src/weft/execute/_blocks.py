"""Bytes of a file -> blocks of a tensor, in reused buffers."""

from __future__ import annotations

import ctypes
import mmap
import threading
from typing import TYPE_CHECKING, Any

from weft.core.blocks import PAGE
from weft.core.dtypes import itemsize
from weft.core.lazy import torch
from weft.execute._files import Files
from weft.native import Numbers

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import TensorRef

__all__ = ["Files", "Memory", "Workspace"]


class Memory:
    """Bytes of the host from the beginning of a page on; they live as long as any part of them."""

    def __init__(self, nbytes: int, *, pin: bool = False) -> None:
        owner = _pinned(nbytes + PAGE) if pin else _anonymous(nbytes or 1)
        view = memoryview(owner)
        address = ctypes.addressof(ctypes.c_char.from_buffer(owner))
        begin = -address % PAGE
        self.view = view[begin : begin + nbytes]
        self.address = address + begin

    def __len__(self) -> int:
        return len(self.view)

    def numbers(self, begin: int, count: int, dtype: str) -> Numbers:
        """`count` numbers, from byte `begin` on."""
        size = itemsize(dtype)
        return Numbers(self.view[begin : begin + count * size], self.address + begin, dtype, size)


def _anonymous(nbytes: int) -> Any:
    """Pages that nobody else sees: without flags a process that is forked shares them."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)  # Windows, which knows no fork
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # which elsewhere tells of files
        raise MemoryError(f"no {nbytes:,} bytes of memory: {error.strerror}") from None


def _pinned(nbytes: int) -> Any:
    """Memory that a GPU copies from while the host goes on."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


def _new_stream(device: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Workspace(threading.local):
    """Each thread's own buffers, made once and reused: memory does not grow with the tensors.

    Arithmetic is float32, or float64 where a tensor is. On a GPU the host buffers are pinned, and
    each thread has a stream of its own, so that one thread's copies overlap another's arithmetic.

    Args:
        device: `cpu`, `cuda` or `cuda:1`.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.kind = device.partition(":")[0]
        self.stream = _new_stream(device) if self.kind == "cuda" else None
        self._host: dict[str, Memory] = {}
        self._compute: dict[tuple[str, torch.dtype], Tensor] = {}

    def host(self, slot: str, count: int, dtype: str, offset: int = 0) -> Numbers:
        """`count` numbers in host memory, which lie in its pages as in a file from `offset` on."""
        nbytes = count * itemsize(dtype)
        if slot not in self._host or len(self._host[slot]) < nbytes + PAGE:
            self._host[slot] = Memory(nbytes + PAGE, pin=self.stream is not None)
        return self._host[slot].numbers(offset % PAGE, count, dtype)

    def compute(self, slot: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised (rows, columns) matrix on the device."""
        key, count = (slot, dtype), rows * columns
        if key not in self._compute or self._compute[key].numel() < count:
            self._compute[key] = torch.empty(count, dtype=dtype, device=self.device)
        return self._compute[key][:count].view(rows, columns)

    def load(self, files: Files, ref: TensorRef, start: int, stop: int, out: Tensor) -> None:
        """Rows `start` to `stop` of `ref`, widened into `out` (rows, columns)."""
        if out.numel():
            self.widen(self.read(files, ref, start, stop, out.shape[1], "in").tensor(), out)

    def read(
        self, files: Files, ref: TensorRef, start: int, stop: int, columns: int, slot: str
    ) -> Numbers:
        """Rows `start` to `stop` of `ref` as they are stored, on the host; `slot` may be reused."""
        found = self.host(slot, (stop - start) * columns, ref.dtype)
        files.read(ref.file, ref.start + start * columns * found.size, found.view)
        return found

    def widen(self, host: Tensor, out: Tensor) -> None:
        """Host values of a narrow dtype, flat -> `out` on the device."""
        if self.stream is not None:
            narrow = self.compute("narrow", out.shape[0], out.shape[1], host.dtype)
            narrow.copy_(host.view(out.shape), non_blocking=True)
            out.copy_(narrow)
            # The host buffer may be filled again as soon as this returns.
            self.stream.synchronize()
        else:
            out.copy_(host.view(out.shape))

    def narrow(self, values: Tensor, out: Tensor) -> Tensor:
        """Round `values` once, to the dtype of `out` on the host; -> the same on the device."""
        if self.stream is None:
            return out.copy_(values)
        rounded = self.compute("rounded", values.shape[0], values.shape[1], out.dtype)
        rounded.copy_(values)
        out.copy_(rounded, non_blocking=True)
        self.stream.synchronize()
        return rounded
