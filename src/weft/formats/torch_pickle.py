"""`.bin`, `.pt` and `.pth` files of torch: where the tensors' bytes are, without running code.

torch's own `weights_only` unpickler does the parsing, on the meta device, so that nothing is
loaded; what comes out are byte ranges as from a safetensors header. Both layouts are read: the zip
archive (torch ≥ 1.6) and the older stream of pickles followed by the storages.
"""

from __future__ import annotations

import hashlib
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from weft.core.errors import FormatError, NotFound, Unsupported
from weft.core.specs import TensorRef
from weft.formats.safetensors import Header

if TYPE_CHECKING:
    from collections.abc import Mapping


def read_header(path: str | Path) -> Header:
    """Find the tensors in the state dict that was saved at `path`.

    Raises:
        NotFound: There is no such file.
        FormatError: Not a flat mapping of names to tensors, cut short, or it calls code.
        Unsupported: A tensor whose elements are not contiguous in the file.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"no such file: {path}")
    try:
        if zipfile.is_zipfile(path):
            state, offsets, sha256 = _read_zip(path)
        else:
            state, offsets, sha256 = _read_legacy(path)
    except pickle.UnpicklingError as error:
        cause = next((line for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise FormatError(
            f"{path} holds more than tensors, and loading it would run code"
            + (f": {cause.strip()[:160]}" if cause else ""),
            "get the model as safetensors, or from somebody you trust",
        ) from None
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        fact = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise FormatError(f"{path} is not a sound torch file: {fact}", "get it again") from None
    size = path.stat().st_size
    refs = [_ref(path, name, tensor, offsets, size) for name, tensor in state.items()]
    refs.sort(key=lambda ref: (ref.start, ref.stop))
    return Header(tuple(refs), {}, sha256)


def _read_zip(path: Path) -> tuple[Mapping[str, Any], dict[int, int], str]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed, which torch never does")
            if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                raise ValueError("its bytes are big-endian")
        pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise ValueError("it has no data.pkl, so it is no torch archive")
        sha256 = hashlib.sha256(archive.read(pickled[0])).hexdigest()
    state = torch.load(path, map_location="meta", weights_only=True)
    offsets: dict[int, int] = {}
    for tensor in _tensors(path, state).values():
        storage = tensor.untyped_storage()
        offset = getattr(storage, "_checkpoint_offset", None)
        if offset is None:
            raise ValueError(
                "this release of torch does not say where its tensors are (need ≥ 2.7)"
            )
        offsets[storage._cdata] = offset
    return state, offsets, sha256


def _read_legacy(path: Path) -> tuple[Mapping[str, Any], dict[int, int], str]:
    """Five pickles (magic, protocol, system, state dict, storage keys), then the storages."""
    from torch._weights_only_unpickler import Unpickler

    storages: dict[str, tuple[torch.UntypedStorage, int]] = {}
    new_storage: Any = torch.UntypedStorage
    typed: Any = torch.storage.TypedStorage
    new_unpickler: Any = Unpickler

    def persistent_load(saved: tuple[Any, ...]) -> Any:
        _, kind, key, _, numel, *_ = saved
        if key not in storages:
            width = kind.dtype.itemsize
            storages[key] = (new_storage(numel * width, device="meta"), width)
        return typed(wrap_storage=storages[key][0], dtype=kind.dtype, _internal=True)

    with path.open("rb") as file:
        for _ in range(3):
            _skip_pickle(file)
        unpickler: Any = new_unpickler(file, encoding="utf-8")
        unpickler.persistent_load = persistent_load
        state = unpickler.load()
        keys = new_unpickler(file, encoding="utf-8").load()
        head = file.tell()
        offsets: dict[int, int] = {}
        for key in keys:
            storage, width = storages[key]
            numel = int.from_bytes(file.read(8), "little")
            if numel * width != storage.nbytes():
                raise ValueError(
                    f"storage {key} has {numel} elements, not {storage.nbytes() // width}"
                )
            offsets[storage._cdata] = file.tell()
            file.seek(numel * width, 1)
        file.seek(0)
        sha256 = hashlib.sha256(file.read(head)).hexdigest()
    return _tensors(path, state), offsets, sha256


def _skip_pickle(file: BinaryIO) -> None:
    for _ in pickletools.genops(file):  # reads up to STOP and executes nothing
        pass


def _tensors(path: Path, state: Any) -> Mapping[str, torch.Tensor]:
    if not isinstance(state, dict):
        raise FormatError(f"{path} holds a {type(state).__name__}, not a mapping of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise FormatError(
                f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor",
                "save the flat state_dict alone",
            )
    return state


def _ref(
    path: Path, name: str, tensor: torch.Tensor, offsets: dict[int, int], size: int
) -> TensorRef:
    if not tensor.is_contiguous():
        raise Unsupported(
            f"{path}: tensor {name!r} is stored transposed or strided",
            "save it again after .contiguous(), best as safetensors",
        )
    storage = tensor.untyped_storage()
    start = offsets[storage._cdata] + int(tensor.storage_offset()) * tensor.element_size()
    stop = start + tensor.numel() * tensor.element_size()
    if stop > size:
        raise FormatError(f"{path}: tensor {name!r} ends beyond the file: it is cut short")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorRef(str(path), name, dtype, tuple(tensor.shape), start, stop)
