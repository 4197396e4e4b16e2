"""A canonical PEFT folder: `adapter_config.json` and `adapter_model.safetensors`, nothing else new.

Written beside its final place and renamed when it is whole, as a checkpoint is.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core.errors import OutputError
from weft.formats.safetensors import build_header

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.specs import TensorRef

_CHUNK = 2**22  # bytes


def write_adapter(
    folder: Path,
    tensors: Mapping[str, TensorRef],
    config: Mapping[str, Any],
    beside: Mapping[str, Path],
    *,
    force: bool = False,
) -> None:
    """Write `tensors` (key -> where its bytes lie) with `config`, and copy the files `beside`.

    Raises:
        OutputError: The folder is there already, or cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not _replaceable(folder, force):
        raise OutputError(f"{folder} exists", "--force replaces an adapter, or give another -o")
    if any(Path(ref.file).is_relative_to(folder) for ref in tensors.values()):
        raise OutputError(f"{folder} holds the adapter that is read", "give another -o")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        try:
            _write_tensors(partial / "adapter_model.safetensors", tensors)
            text = json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False)
            (partial / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
            for name, source in beside.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, partial / name)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}: {error.strerror}", "free some space, or give another -o"
        ) from None


def _replaceable(folder: Path, force: bool) -> bool:
    """An empty folder, or with `force` an adapter."""
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or (force and (folder / "adapter_config.json").exists())


def _write_tensors(path: Path, tensors: Mapping[str, TensorRef]) -> None:
    head, _ = build_header(
        [(name, ref.dtype, ref.shape) for name, ref in tensors.items()], {"format": "pt"}
    )
    with path.open("wb") as out:
        out.write(head)
        for ref in tensors.values():
            with Path(ref.file).open("rb") as file:
                file.seek(ref.start)
                left = ref.nbytes
                while left:
                    data = file.read(min(left, _CHUNK))
                    if not data:
                        raise OSError(0, f"{ref.file} ended while it was being read")
                    out.write(data)
                    left -= len(data)
        out.flush()
        os.fsync(out.fileno())
