"""`.bin`, `.pt` and `.pth` files of torch: where the tensors' bytes are, without running code.

torch's own `weights_only` unpickler does the parsing, with storages on the meta device, so that
nothing is loaded; what comes out are byte ranges as from a safetensors header. Both layouts are
read: the zip archive (torch ≥ 1.6) and the older stream of pickles followed by the storages.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from weft.core.dtypes import CODES
from weft.core.errors import FormatError, NotFound, Unsupported, WeftError
from weft.core.specs import Source, TensorRef
from weft.core.units import clean
from weft.formats.identity import identify
from weft.formats.safetensors import Header

if TYPE_CHECKING:
    from collections.abc import Mapping

# What torch's unpickler says when a file asks for something other than tensors; 147 is the code of
# STACK_GLOBAL, by which newer pickles name a function.
_CODE = ("GLOBAL", "Unsupported class", "Unsupported function", "Trying to call", "operand 147")


@dataclass(slots=True)
class _Storage:
    """A run of elements that tensors are views of; `start` is where it begins in the file."""

    meta: torch.UntypedStorage
    width: int
    start: int | None = None


def read_header(path: str | Path) -> Header:
    """Find the tensors in the state dict that was saved at `path`.

    Raises:
        NotFound: There is no such file.
        FormatError: Not a flat mapping of names to tensors, cut short, or it calls code.
        Unsupported: A tensor whose elements are not simply contiguous bytes of the file.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"no such file: {path}")
    try:
        with path.open("rb") as file:
            identity = identify(file)
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            state, storages, sha256 = read(path, file)
        places = {s.meta._cdata: s for s in storages.values()}
        refs = [_ref(path, name, tensor, places, identity.size) for name, tensor in state.items()]
    except WeftError:
        raise
    except Exception as error:  # a malformed pickle makes the unpickler raise anything at all
        raise _not_sound(path, error) from None
    refs.sort(key=lambda ref: (ref.start, ref.stop))
    return Header(tuple(refs), {}, Source(str(path), sha256, identity))


def _not_sound(path: Path, error: Exception) -> FormatError:
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, pickle.UnpicklingError) and any(sign in text for sign in _CODE):
        cause = next((line for line in lines if "GLOBAL" in line), "")
        return FormatError(
            f"{path} holds more than tensors, and loading it would run code"
            + (f": {clean(cause)[:160]}" if cause else ""),
            "get the model as safetensors, or from somebody you trust",
        )
    fact = next((line for line in lines if line.startswith("Unsupported")), lines[0])
    return FormatError(f"{path} is not a sound torch file: {clean(fact)[:120]}", "get it again")


# ---------------------------------------------------------------------------------- the two layouts

_Found = tuple["Mapping[str, torch.Tensor]", dict[str, _Storage], str]


def _read_zip(path: Path, file: BinaryIO) -> _Found:
    """An archive whose `data.pkl` names the records `data/0`, `data/1` … that hold the bytes."""
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed, which torch never does")
            if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                raise ValueError("its bytes are big-endian")
        pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise ValueError("it has no data.pkl, so it is no torch archive")
        content = archive.read(pickled[0])
        state, storages = _unpickle(io.BytesIO(content))
        for key, storage in storages.items():
            info = archive.getinfo(pickled[0].removesuffix("data.pkl") + f"data/{key}")
            if info.file_size != storage.meta.nbytes():
                raise ValueError(
                    f"{info.filename} has {info.file_size:,} bytes, not the "
                    f"{storage.meta.nbytes():,} of its storage"
                )
            file.seek(info.header_offset + 26)  # the record's own lengths of name and extra
            name, extra = struct.unpack("<HH", file.read(4))
            storage.start = info.header_offset + 30 + name + extra
    return _tensors(path, state), storages, hashlib.sha256(content).hexdigest()


def _read_legacy(path: Path, file: BinaryIO) -> _Found:
    """Five pickles (magic, protocol, system, state dict, storage keys), then the storages."""
    file.seek(0)
    for _ in range(3):
        for _ in pickletools.genops(file):  # reads up to STOP and executes nothing
            pass
    state, storages = _unpickle(file)
    keys, _ = _unpickle(file)
    head = file.tell()
    for key in keys:
        storage = storages[key]
        numel = int.from_bytes(file.read(8), "little")
        if numel * storage.width != storage.meta.nbytes():
            expected = storage.meta.nbytes() // storage.width
            raise ValueError(f"storage {key} has {numel} elements, not {expected}")
        storage.start = file.tell()
        file.seek(numel * storage.width, 1)
    file.seek(0)
    sha256 = hashlib.sha256(file.read(head)).hexdigest()
    return _tensors(path, state), storages, sha256


def _unpickle(file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """One pickle by torch's weights-only rules, and the storages that it mentions, by key."""
    from torch._weights_only_unpickler import Unpickler

    storages: dict[str, _Storage] = {}
    untyped: Any = torch.UntypedStorage
    typed: Any = torch.storage.TypedStorage

    def persistent_load(saved: tuple[Any, ...]) -> Any:
        _, kind, key, _, numel, *view = saved
        if numel < 0 or any(part is not None for part in view):
            raise ValueError(f"storage {key} is a view of another, as torch before 0.4 saved them")
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if key not in storages:
            meta = untyped(numel * dtype.itemsize, device="meta")
            storages[key] = _Storage(meta, dtype.itemsize)
        return typed(wrap_storage=storages[key].meta, dtype=dtype, _internal=True)

    new_unpickler: Any = Unpickler
    unpickler = new_unpickler(file, encoding="utf-8")
    unpickler.persistent_load = persistent_load
    return unpickler.load(), storages


# ------------------------------------------------------------------------------------------ tensors


def _tensors(path: Path, state: Any) -> Mapping[str, torch.Tensor]:
    if not isinstance(state, dict):
        raise FormatError(f"{path} holds a {type(state).__name__}, not a mapping of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise FormatError(
                f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor",
                "save the flat state_dict alone",
            )
        name.encode()  # half a surrogate pair is no name
    return state


def _ref(
    path: Path, name: str, tensor: torch.Tensor, places: dict[int, _Storage], size: int
) -> TensorRef:
    dtype = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.layout == torch.strided and not (tensor.is_conj() or tensor.is_neg())
    if not plain or not tensor.is_contiguous() or dtype not in CODES:
        raise Unsupported(
            f"{path}: tensor {name!r} is stored transposed or strided, or as {dtype} values that "
            "are not simply the bytes of the file",
            "save it again after .contiguous(), best as safetensors",
        )
    storage = tensor.untyped_storage()
    begin = places[storage._cdata].start if storage._cdata in places else None
    if begin is None:
        raise FormatError(f"{path} is not a sound torch file: it has no bytes for {name!r}")
    start = begin + int(tensor.storage_offset()) * tensor.element_size()
    stop = start + tensor.numel() * tensor.element_size()
    if not begin <= start <= stop <= begin + storage.nbytes():
        raise FormatError(f"{path} is not a sound torch file: {name!r} reaches beyond its storage")
    if stop > size:
        raise FormatError(f"{path}: tensor {name!r} ends beyond the file: it is cut short")
    return TensorRef(str(path), name, dtype, tuple(tensor.shape), start, stop)
