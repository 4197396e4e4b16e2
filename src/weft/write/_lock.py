"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from weft.core.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path


def lock(folder: Path) -> int:
    """A handle that keeps other runs out of `folder` until it is closed, by a kill too.

    The lock is on the folder: it goes with it through the last rename.

    Raises:
        OutputError: Another run has it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise OutputError(
            f"another run is writing {folder}", "wait for it, or write to another folder"
        ) from None
    return handle
