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
from weft.formats.side_files import KEPT_FOLDERS, part_of
from weft.write._lock import lock
from weft.write._replace import put_in_place, replaced, sync

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


def check_folder(folder: Path, files: Iterable[str], *, force: bool, resume: bool = False) -> Path:
    """`folder` by its real path, if an adapter made from `files` may be written there.

    Raises:
        OutputError: It is there already, or holds what is read.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not _replaceable(folder, force):
        if _replaceable(folder, True):
            what = "exists, so there is nothing to resume" if resume else "exists"
            raise OutputError(f"{folder} {what}", "--force replaces it, or give another -o")
        what = "is no adapter, or not one alone" if folder.is_dir() else "is a file"
        raise OutputError(
            f"{folder} exists and {what}, so --force does not replace it",
            "remove it yourself, or give another -o",
        )
    if any(Path(os.path.realpath(file)).is_relative_to(folder) for file in files):
        raise OutputError(f"{folder} holds the adapter that is read", "give another -o")
    return folder


def check_places(folder: Path, files: Iterable[str], *, force: bool) -> tuple[Path, Path]:
    """`check_folder`, and the folder beside it in which the adapter is made.

    Raises:
        OutputError: One of them is there already, or holds what is read.
    """
    files = list(files)
    folder = check_folder(folder, files, force=force)
    partial = folder.with_name(f"{folder.name}.partial")
    for file in files:
        if Path(os.path.realpath(file)).is_relative_to(partial):
            raise OutputError(f"{partial} holds the adapter that is read", "give another -o")
    if partial.is_dir() and (left := list(partial.iterdir())):
        if not all(map(_is_an_adapters, left)):
            raise OutputError(
                f"{partial} is not what an adapter was being made in, and a run would have to "
                "replace it",
                "move it away, or give another -o",
            )
        if not force:
            raise OutputError(f"{partial} is what an interrupted run left", "--force starts over")
    return folder, partial


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
        force: Replace an adapter that is there already, or what an interrupted run left.
        within: A folder of the same disk in which it is made, of a run that can be resumed.

    Raises:
        OutputError: The folder or its `.partial` is there already, or cannot be written.
    """
    read = [piece.ref.file for piece in tensors.values() if isinstance(piece, Piece)]
    if within is not None:
        folder, partial = check_folder(folder, read, force=force), within / "adapter"
        cure = "free some space, then run the same command with --resume"
    else:
        folder, partial = check_places(folder, read, force=force)
        cure = "free some space, or give another -o"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = lock(partial)
        try:
            _clear(partial)
            _check_space(partial, tensors, cure)
            _write_tensors(partial / "adapter_model.safetensors", tensors)
            text = json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False)
            (partial / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
            for name, source in beside.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, partial / name)
            for name, content in texts().items():
                (partial / name).write_text(content, encoding="utf-8")
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            put_in_place(partial, folder)
            for old in replaced(folder) if force else ():  # by runs that were killed then
                if all(map(_is_an_adapters, old.iterdir())):
                    shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(handle)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", cure) from None


def _replaceable(folder: Path, force: bool) -> bool:
    """An empty folder; or with `force` one that holds an adapter, and nothing but an adapter."""
    if not folder.is_dir():
        return False
    found = list(folder.iterdir())
    ours = all(map(_is_an_adapters, found))
    return not found or (force and ours and (folder / "adapter_config.json").exists())


def _is_an_adapters(path: Path) -> bool:
    if path.is_dir():
        return path.name in KEPT_FOLDERS
    ours = path.name.startswith("adapter_") or path.name in ("README.md", "weft.json")
    return ours or part_of(path.name) is not None


def _clear(partial: Path) -> None:
    """Remove what a run that was killed left."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


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
