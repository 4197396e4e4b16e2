"""A canonical PEFT folder: `adapter_config.json` and `adapter_model.safetensors`, nothing else new.

Written beside its final place and renamed when it is whole, as a checkpoint is.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core.dtypes import itemsize
from weft.core.errors import OutputError
from weft.core.units import show_size
from weft.formats.safetensors import build_header
from weft.formats.side_files import part_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from weft.core.specs import Shape, TensorRef

_CHUNK = 2**22  # bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor that is written, and where its values lie.

    Attributes:
        ref: The tensor in the file that it comes from.
        shape: What it has when it is written.
        turned: It lies transposed.
        heads: Its rows lie in torchtune's rotary order, of so many heads.
    """

    ref: TensorRef
    shape: Shape
    turned: bool = False
    heads: int = 0

    @property
    def as_it_lies(self) -> bool:
        return not self.turned and not self.heads


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that is computed when its turn comes.

    Attributes:
        dtype, shape: What it has when it is written.
        values: Gives its bytes, little-endian, in pieces or at once.
    """

    dtype: str
    shape: Shape
    values: Callable[[], bytes | Iterable[bytes]]


def check_folder(folder: Path, files: Iterable[str], *, force: bool) -> Path:
    """`folder` by its real path, if an adapter made from `files` may be written there.

    Raises:
        OutputError: It is there already, or holds what is read.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not _replaceable(folder, force):
        raise OutputError(
            f"{folder} exists",
            "give another -o (--force replaces an adapter, where nothing else lies beside it)",
        )
    if any(Path(os.path.realpath(file)).is_relative_to(folder) for file in files):
        raise OutputError(f"{folder} holds the adapter that is read", "give another -o")
    return folder


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Piece | Made],
    config: Mapping[str, Any],
    beside: Mapping[str, Path],
    *,
    texts: Callable[[], Mapping[str, str]] = dict,
    force: bool = False,
    within: Path | None = None,
) -> None:
    """Write `tensors` (key -> what it is) with `config`, and copy the files `beside`.

    Args:
        folder: To be made.
        tensors: In the order of the file.
        config: `adapter_config.json`.
        beside: Name in the folder -> the file to copy.
        texts: Asked when all tensors are written: name in the folder -> what it says.
        force: Replace an adapter that is there already.
        within: A folder of the same disk in which it is made, of a run that can be resumed.

    Raises:
        OutputError: The folder is there already, or cannot be written.
    """
    read = [piece.ref.file for piece in tensors.values() if isinstance(piece, Piece)]
    folder = check_folder(folder, read, force=force)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    if within is not None:
        partial = within / "adapter"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    cure = "free some space, or give another -o"
    if within is not None:
        cure = "free some space, then run the same command with --resume"
    try:
        partial.mkdir(parents=True)
        try:
            _check_space(partial, tensors, cure)
            _write_tensors(partial / "adapter_model.safetensors", tensors)
            text = json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False)
            (partial / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
            for name, source in beside.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, partial / name)
            for name, content in texts().items():
                (partial / name).write_text(content, encoding="utf-8")
            _put_in_place(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", cure) from None


def _replaceable(folder: Path, force: bool) -> bool:
    """An empty folder; or with `force` one that holds an adapter, and nothing but an adapter."""
    if not folder.is_dir():
        return False
    found = list(folder.iterdir())
    ours = all(path.is_file() and _is_an_adapters(path.name) for path in found)
    return not found or (force and ours and (folder / "adapter_config.json").exists())


def _is_an_adapters(name: str) -> bool:
    ours = name.startswith("adapter_") or name in ("README.md", "weft.json")
    return ours or part_of(name) is not None


def _put_in_place(made: Path, folder: Path) -> None:
    """At every moment the old adapter or the new one is there, if under another name."""
    old = folder.with_name(f"{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def head_of(tensors: Mapping[str, Piece | Made]) -> bytes:
    """What `adapter_model.safetensors` begins with."""
    found = [
        (name, piece.dtype if isinstance(piece, Made) else piece.ref.dtype, piece.shape)
        for name, piece in tensors.items()
    ]
    return build_header(found, {"format": "pt"})[0]


def _check_space(partial: Path, tensors: Mapping[str, Piece | Made], cure: str) -> None:
    """Raises OutputError, if there is too little for the weights."""
    needed = len(head_of(tensors)) + sum(map(_bytes, tensors.values()))
    free = shutil.disk_usage(partial).free
    if needed > free:
        what = f"{partial} has {show_size(free)} free, the adapter takes {show_size(needed)}"
        raise OutputError(what, cure)


def _bytes(piece: Piece | Made) -> int:
    dtype = piece.dtype if isinstance(piece, Made) else piece.ref.dtype
    return math.prod(piece.shape) * itemsize(dtype)


def _write_tensors(path: Path, tensors: Mapping[str, Piece | Made]) -> None:
    with path.open("wb") as out:
        out.write(head_of(tensors))
        for piece in tensors.values():
            if isinstance(piece, Made):
                made = piece.values()
                out.writelines([made] if isinstance(made, bytes) else made)
            elif piece.as_it_lies:
                out.writelines(_read(piece.ref))
            else:
                out.write(_in_order(piece))
        out.flush()
        os.fsync(out.fileno())


def _read(ref: TensorRef) -> Iterator[bytes]:
    with Path(ref.file).open("rb") as file:
        file.seek(ref.start)
        left = ref.nbytes
        while left:
            data = file.read(min(left, _CHUNK))
            if not data:
                raise OSError(0, f"{ref.file} ended while it was being read")
            yield data
            left -= len(data)


def _in_order(piece: Piece) -> bytes:
    """The bytes of a factor, its values moved and none of them changed."""
    import torch

    from weft.deltas._low_rank import in_halves

    raw = torch.frombuffer(bytearray().join(_read(piece.ref)), dtype=torch.uint8)
    values = raw.view(getattr(torch, piece.ref.dtype)).view(piece.ref.shape)
    values = values.T if piece.turned else values
    moved = in_halves(values.contiguous(), piece.heads).reshape(piece.shape)
    return moved.contiguous().flatten().view(torch.uint8).numpy().tobytes()
