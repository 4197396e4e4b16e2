"""The last act: the finished folder gets its name, also where a model has that name already."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def put_in_place(new: Path, out: Path) -> None:
    """`new` becomes `out`, in one step; what was there goes when that is durable.

    Where the system cannot exchange two names, there is no `out` between two steps, and a kill
    there leaves the old model as one of `replaced(out)`.
    """
    if not out.exists():
        new.rename(out)
        sync(out.parent)
        return
    names = (out.with_name(f"{out.name}.replaced-{n}") for n in itertools.count(1))
    old = next(name for name in names if not name.exists())
    if exchange(new, out):
        with contextlib.suppress(OSError):  # the output is there: this is only tidying up
            new.rename(old)
    else:
        out.rename(old)
        try:
            new.rename(out)
        except OSError:
            old.rename(out)
            raise
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def replaced(out: Path) -> list[Path]:
    """What earlier runs left of models that `out` was: they were killed, or could not delete."""
    found = out.parent.glob(f"{glob.escape(out.name)}.replaced-*")
    return sorted(p for p in found if p.name.rpartition("-")[2].isdigit() and p.is_dir())


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux, or a C library of before 2018
        return False
    return bool(renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def sync(path: Path) -> None:
    """Make a file durable, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
