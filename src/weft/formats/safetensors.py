"""The safetensors header, read and written in pure Python (format: huggingface/safetensors README).

A file is 8 bytes of header length N (little-endian), N bytes of JSON, then the tensors' bytes
without a hole. The reader believes nothing: lengths, offsets, shapes and names are checked against
each other and against the file before a single byte range leaves this module.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core.blocks import PAGE
from weft.core.dtypes import CODES, NAMES, itemsize
from weft.core.errors import FormatError, NotFound
from weft.core.specs import Shape, Source, TensorRef
from weft.formats.identity import identify

if TYPE_CHECKING:
    from collections.abc import Iterable

_LARGEST = 2**64  # bytes
# As `struct` knows them; a bfloat16 is the upper half of a float32.
_FORMATS = {"float64": "d", "float32": "f", "bfloat16": "f", "float16": "e", "int64": "q"}
MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation


@dataclass(frozen=True, slots=True)
class Header:
    """What one file holds: its tensors in the order of their bytes, its metadata, and itself."""

    tensors: tuple[TensorRef, ...]
    metadata: dict[str, str]
    source: Source


def read_header(path: str | Path) -> Header:
    """Read the header of `path` and check it against the file.

    Raises:
        NotFound: There is no such file.
        FormatError: The file is not what the format demands; the message says where.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            identity = identify(file)
            size = identity.size
            first = file.read(8)
            if len(first) < 8:
                raise _broken(path, f"it has {size} bytes, and a header length alone takes 8")
            if first == b"version ":
                raise FormatError(f"{path} is a git-lfs pointer, not the file", "git lfs pull")
            length = int.from_bytes(first, "little")
            if length > MAX_HEADER:
                raise _broken(path, f"its header claims {length:,} bytes (at most {MAX_HEADER:,})")
            if length > size - 8:
                raise _broken(path, f"its header claims {length:,} bytes and the file has {size:,}")
            raw = file.read(length)
    except FileNotFoundError:
        raise NotFound(f"no such file: {path}") from None
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    content = _parse(path, raw)
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "its __metadata__ is not a mapping of strings")
    data = 8 + length
    refs = [_entry(path, name, entry, data, size) for name, entry in content.items()]
    refs.sort(key=lambda ref: (ref.start, ref.stop))
    _check_cover(path, refs, data, size)
    sha256 = hashlib.sha256(first + raw).hexdigest()
    return Header(tuple(refs), metadata, Source(str(path), sha256, identity))


def read_scalar(ref: TensorRef) -> float:
    """The one number of a tensor that has only one; NaN for a dtype that Python has no word for."""
    if ref.dtype not in _FORMATS:
        return math.nan
    with Path(ref.file).open("rb") as file:
        file.seek(ref.start)
        raw = file.read(ref.nbytes)
    if ref.dtype == "bfloat16":
        raw = b"\0\0" + raw
    (number,) = struct.unpack(f"<{_FORMATS[ref.dtype]}", raw)
    return float(number)


def build_header(
    tensors: Iterable[tuple[str, str, Shape]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The head of a file with `tensors` (name, dtype, shape), laid out in the order given.

    Returns:
        The bytes before the data, and each tensor's offset in the file. The data begins with
        a page, as files written past the page cache need it (readers ask for a multiple of 8).
    """
    content: dict[str, Any] = {"__metadata__": metadata}
    offsets: dict[str, int] = {}
    offset = 0
    for name, dtype, shape in tensors:
        offsets[name] = offset
        end = offset + math.prod(shape) * itemsize(dtype)
        content[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    raw = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % PAGE)
    head = len(raw).to_bytes(8, "little") + raw
    return head, {name: len(head) + start for name, start in offsets.items()}


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise _broken(path, f"its header has the key {twice!r} twice")
        return keys

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no name
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, absurd numbers
        raise _broken(path, f"its header is not JSON: {str(error)[:80]}") from None
    if not isinstance(content, dict):
        raise _broken(path, f"its header is a JSON {type(content).__name__}, not an object")
    return content


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> TensorRef:
    def wrong(fact: str) -> FormatError:
        return _broken(path, f"tensor {name!r}: {fact}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("its entry is not {dtype, shape, data_offsets}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in NAMES:
        raise wrong(f"unknown dtype {str(code)[:40]!r}")
    if not _integers(shape) or min(shape, default=0) < 0:
        raise wrong("its shape is not a list of non-negative integers")
    if not _integers(offsets) or len(offsets) != 2:
        raise wrong("its data_offsets are not two integers")
    start, stop = offsets
    if not 0 <= start <= stop:
        raise wrong(f"data_offsets {start}…{stop} run backwards")
    if data + stop > size:
        raise wrong(f"its bytes end at {data + stop:,} and the file at {size:,}: it is cut short")
    dtype = NAMES[code]
    need = itemsize(dtype)
    for n in shape:
        need *= n
        if need >= _LARGEST:  # the reference implementation refuses it as well, zero or not behind
            raise wrong("its shape has more elements than any file can hold")
    if stop - start != need:
        fact = f"{dtype} {shape} takes {need:,} bytes and the offsets give {stop - start:,}"
        raise wrong(fact)
    return TensorRef(str(path), name, dtype, tuple(shape), data + start, data + stop)


def _integers(value: Any) -> bool:
    """A list of integers (a bool is none) that can be printed."""
    return isinstance(value, list) and all(type(n) is int and abs(n) < 10**30 for n in value)


def _check_cover(path: Path, refs: list[TensorRef], data: int, size: int) -> None:
    """The format allows neither overlaps nor holes: both are ways to smuggle or lose bytes."""
    end = data
    for ref in refs:
        if ref.start < end:
            raise _broken(path, f"tensor {ref.name!r} overlaps the one before it")
        if ref.start > end:
            raise _broken(
                path, f"{ref.start - end:,} bytes before {ref.name!r} belong to no tensor"
            )
        end = ref.stop
    if end != size:
        raise _broken(path, f"{size - end:,} bytes at the end belong to no tensor")


def _broken(path: Path, fact: str) -> FormatError:
    return FormatError(
        f"{path} is not a sound safetensors file: {fact}", "get the file again, or save it again"
    )
