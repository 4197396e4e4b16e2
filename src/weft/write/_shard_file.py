"""One shard on the disk, written at any offset by any thread.

The output is flushed before it gets its name, so the page cache would only be a detour: where the
file system allows it, whole pages go straight from the buffer to the disk (O_DIRECT), and what is
left of a page at the edges of a write goes through the cache. The two never touch the same page.
Elsewhere all bytes go through the cache, and a thread flushes them while the rest is computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING

from weft.core.blocks import COPY_BUFFER, PAGE

if TYPE_CHECKING:
    from pathlib import Path

_NO_KERNEL_COPY = {
    errno.EXDEV,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EIO,
}
_buffers = threading.local()


class ShardFile:
    """A file of known size. All methods raise OSError; all but `close` may run in any thread."""

    def __init__(self, path: Path, header: bytes, size: int, flusher: Flusher) -> None:
        """Open or create `path`, give it its size, and write its header."""
        self._flusher = flusher
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._direct: int | None = None
        self._past_cache = False
        self._kernel_copies = hasattr(os, "copy_file_range")
        try:
            os.ftruncate(self._handle, size)
            _write_all(self._handle, memoryview(header), 0)
            with contextlib.suppress(OSError, AttributeError):  # not here: through the cache then
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
                self._past_cache = mmap.PAGESIZE <= PAGE  # else the two could meet in a page
        except BaseException:
            self.close()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Put `data` at `offset`; past the cache if its memory lies in pages as the file does."""
        head = -offset % PAGE
        whole = (len(data) - head) // PAGE * PAGE
        pages = self._past_cache and whole > 0 and (_address(data) - offset) % PAGE == 0
        if pages and self._write_direct(data[head : head + whole], offset + head):
            self._write_cached(data[:head], offset)
            self._write_cached(data[head + whole :], offset + head + whole)
        else:
            self._write_cached(data, offset)

    def copy(self, source: int, start: int, offset: int, count: int) -> None:
        """Put `count` bytes of the open file `source`, from `start` on, at `offset`."""
        if self._kernel_copies and not self._past_cache:
            try:
                _copy_in_kernel(source, self._handle, start, offset, count)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                self._kernel_copies = False  # other file systems, an old kernel
            else:
                self._flusher.wrote(self._handle, count)
                return
        while count:
            # Laid out in memory as in the file, and cut where its pages end.
            phase = offset % PAGE
            view = _buffer()[phase : phase + min(count, COPY_BUFFER - phase)]
            done = os.preadv(source, [view], start)
            if not done:
                raise OSError(errno.ENODATA, "the input ended while it was being copied")
            self.write(view[:done], offset)
            start, offset, count = start + done, offset + done, count - done

    def sync(self) -> None:
        """All that was written is on the disk."""
        os.fsync(self._handle)

    def close(self) -> None:
        for handle in (self._handle, self._direct):
            if handle is not None:
                os.close(handle)

    def _write_direct(self, data: memoryview, offset: int) -> bool:
        """Whether the file system took it; some open a file for this and then refuse."""
        assert self._direct is not None
        try:
            _write_all(self._direct, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._past_cache = False
        return self._past_cache

    def _write_cached(self, data: memoryview, offset: int) -> None:
        _write_all(self._handle, data, offset)
        self._flusher.wrote(self._handle, len(data))


class Flusher:
    """Sends what lies in the page cache on to the disk while the rest is computed.

    Durability needs an fsync before the rename; this leaves it little to do.
    """

    _STEP = 2**28  # bytes

    def __init__(self) -> None:
        self._error: OSError | None = None
        self._dirty: dict[int, int] = {}
        self._wake = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def wrote(self, handle: int, count: int) -> None:
        """`count` more bytes wait to be flushed; every `_STEP` of them the thread is woken."""
        with self._wake:
            self._dirty[handle] = self._dirty.get(handle, 0) + count
            if self._dirty[handle] < self._STEP:
                return
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="weft-flush", daemon=True)
                self._thread.start()
            self._wake.notify()

    def stop(self) -> None:
        """Leave the rest to fsync."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Raise what the thread met: the system reports it once, and a later fsync would not."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._stopped or max(self._dirty.values(), default=0) >= self._STEP
                )
                if self._stopped:
                    return
                handle = max(self._dirty, key=lambda h: self._dirty[h])
                self._dirty[handle] = 0
            try:
                os.fdatasync(handle) if hasattr(os, "fdatasync") else os.fsync(handle)
            except OSError as error:
                self._error = error
                return


def _buffer() -> memoryview:
    """This thread's `COPY_BUFFER` bytes, at the beginning of a page."""
    if not hasattr(_buffers, "view"):
        _buffers.view = memoryview(mmap.mmap(-1, COPY_BUFFER))
    view: memoryview = _buffers.view
    return view


def _address(data: memoryview) -> int:
    """Where the bytes lie in memory; what cannot be written to lies where it must not be direct."""
    return 1 if data.readonly else ctypes.addressof(ctypes.c_char.from_buffer(data))


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(handle, data, offset)
        data, offset = data[done:], offset + done


def _copy_in_kernel(source: int, target: int, start: int, offset: int, count: int) -> None:
    """Bytes between two files without passing through this process; a reflink where there are."""
    while count:
        moved = os.copy_file_range(source, target, count, start, offset)
        if not moved:
            raise OSError(errno.EIO, "the input ended while it was being copied")
        start, offset, count = start + moved, offset + moved, count - moved
