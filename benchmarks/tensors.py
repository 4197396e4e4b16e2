"""Which tensors of two checkpoints differ, byte by byte and in little memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def changed(base: Path, out: Path) -> set[str]:
    """The tensors of `base` that `out` lacks, or has other bytes for."""
    old, new = spans(base), spans(out)
    return {name for name in old if name not in new or not same(old[name], new[name])}


def spans(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Where each tensor of a checkpoint lies: file, begin and end."""
    found: dict[str, tuple[Path, int, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = (path, 8 + size + begin, 8 + size + end)
    return found


def same(a: tuple[Path, int, int], b: tuple[Path, int, int], step: int = 2**20) -> bool:
    """Whether two tensors have the same bytes, read in pieces."""
    if a[2] - a[1] != b[2] - b[1]:
        return False
    with a[0].open("rb") as one, b[0].open("rb") as two:
        one.seek(a[1])
        two.seek(b[1])
        for at in range(a[1], a[2], step):
            count = min(step, a[2] - at)
            if one.read(count) != two.read(count):
                return False
    return True
