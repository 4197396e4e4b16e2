"""The pieces of a sentencepiece model: as much of its protocol buffer as says their numbers.

`ModelProto.pieces` is field 1; of a piece, field 1 is its text, 2 its score and 3 its type (1
normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte).
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NORMAL = 1


def read_pieces(path: Path) -> list[tuple[str, int]]:
    """Text and type of every piece, in the order of their numbers.

    Raises:
        FormatError: The file is no sentencepiece model.
    """
    raw = path.read_bytes()
    try:
        pieces = [_piece(value) for number, value in _fields(raw) if number == 1]
    except (IndexError, UnicodeDecodeError, ValueError, TypeError):
        pieces = []
    if not pieces:
        raise FormatError(f"{path} is no sentencepiece model", "save or download the file again")
    return pieces


def _piece(raw: bytes | int) -> tuple[str, int]:
    if isinstance(raw, int):
        raise TypeError(raw)
    text, kind = "", NORMAL
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, kind


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a message; fixed-size numbers stay bytes."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(raw, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(wire)
        if at + size > len(raw):
            raise IndexError(at)
        yield tag >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
