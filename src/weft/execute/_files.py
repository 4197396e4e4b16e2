"""Open input files; no torch, for those who need none."""

from __future__ import annotations

import contextlib
import os
import threading

from weft.core.errors import FormatError


class Files:
    """Open input files, shared by all threads; `pread` needs no position and no lock."""

    def __init__(self) -> None:
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on.

        Raises:
            FormatError: The file ends before that: it was cut after its header was read.
        """
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._handle(file), [into[done:]], offset + done)
            except OSError as error:
                raise FormatError(f"cannot read {file}: {error.strerror}") from None
            if count == 0:
                raise FormatError(f"{file} ended at byte {offset + done:,} while it was being read")
            done += count

    def soon(self, file: str, offset: int, count: int) -> None:
        """These bytes will be read: where the system can, it fetches them from the disk meanwhile.

        What is wrong with the file, `read` will say.
        """
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._handle(file), offset, count, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _handle(self, file: str) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._handles[file]
