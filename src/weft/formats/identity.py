"""Which file it is that lies open, or that bears a name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from weft.core.specs import Identity


def identify(file: Path | BinaryIO) -> Identity:
    """Numbers that change when the file does, and when another one takes its name."""
    stat = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
    return Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
