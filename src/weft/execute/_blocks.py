"""Bytes of a file -> blocks of a tensor, in reused buffers."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING

import torch

from weft.core.blocks import PAGE
from weft.execute._files import Files

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import TensorRef

__all__ = ["Files", "Workspace"]


def pages(nbytes: int, *, pin: bool) -> tuple[Tensor, memoryview]:
    """Host memory from the beginning of a page on."""
    tensor = torch.empty(nbytes + PAGE, dtype=torch.uint8, device="cpu", pin_memory=pin)
    tensor = tensor[-tensor.data_ptr() % PAGE :][:nbytes]
    raw = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    return tensor, memoryview(raw).cast("B")


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Workspace(threading.local):
    """Each thread's own buffers, made once and reused: memory does not grow with the tensors.

    Arithmetic is float32, or float64 where a tensor is. On a GPU the host buffers are pinned, and
    each thread has a stream of its own, so that one thread's copies overlap another's arithmetic.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _new_stream(device) if device.type == "cuda" else None
        self._host: dict[str, tuple[Tensor, memoryview]] = {}
        self._compute: dict[tuple[str, torch.dtype], Tensor] = {}

    def host(self, slot: str, nbytes: int, offset: int = 0) -> tuple[Tensor, memoryview]:
        """`nbytes` of host memory, as a tensor and as a buffer of the same bytes.

        They lie in the memory's pages as bytes from `offset` on lie in a file's.
        """
        if slot not in self._host or self._host[slot][0].numel() < nbytes + PAGE:
            self._host[slot] = pages(nbytes + PAGE, pin=self.stream is not None)
        tensor, view = self._host[slot]
        begin = offset % PAGE
        return tensor[begin : begin + nbytes], view[begin : begin + nbytes]

    def compute(self, slot: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised (rows, columns) matrix on the device."""
        key, count = (slot, dtype), rows * columns
        if key not in self._compute or self._compute[key].numel() < count:
            self._compute[key] = torch.empty(count, dtype=dtype, device=self.device)
        return self._compute[key][:count].view(rows, columns)

    def load(self, files: Files, ref: TensorRef, start: int, stop: int, out: Tensor) -> None:
        """Rows `start` to `stop` of `ref`, widened into `out` (rows, columns)."""
        if out.numel():
            self.widen(self.read(files, ref, start, stop, out.shape[1], "in"), out)

    def read(
        self, files: Files, ref: TensorRef, start: int, stop: int, columns: int, slot: str
    ) -> Tensor:
        """Rows `start` to `stop` of `ref` as they are stored, on the host; `slot` may be reused."""
        dtype = getattr(torch, ref.dtype)
        row = columns * dtype.itemsize
        tensor, view = self.host(slot, (stop - start) * row)
        files.read(ref.file, ref.start + start * row, view)
        return tensor.view(dtype).view(stop - start, columns)

    def widen(self, host: Tensor, out: Tensor) -> None:
        """Host values of a narrow dtype -> `out` on the device."""
        if self.stream is not None:
            narrow = self.compute("narrow", out.shape[0], out.shape[1], host.dtype)
            narrow.copy_(host, non_blocking=True)
            out.copy_(narrow)
            # The host buffer may be filled again as soon as this returns.
            self.stream.synchronize()
        else:
            out.copy_(host)

    def narrow(self, values: Tensor, out: Tensor) -> Tensor:
        """Round `values` once, to the dtype of `out` on the host; -> the same on the device."""
        if self.stream is None:
            return out.copy_(values)
        rounded = self.compute("rounded", values.shape[0], values.shape[1], out.dtype)
        rounded.copy_(values)
        out.copy_(rounded, non_blocking=True)
        self.stream.synchronize()
        return rounded
