"""Element types: the names that Weft prints, and the codes that safetensors stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Iterable

# safetensors code -> (name as torch spells it, bits per element), from the format's README
_CODES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
NAMES = {code: name for code, (name, _) in _CODES.items()}
CODES = {name: code for code, name in NAMES.items()}
_SIZES = {name: bits // 8 for name, bits in _CODES.values()}

# The types that a weight may have when arithmetic is to be done on it.
WEIGHTS = ("float64", "float32", "bfloat16", "float16")
_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "f16": "float16",
    "fp32": "float32",
    "float": "float32",
    "f32": "float32",
}
OUTPUTS = ("bfloat16", "float16", "float32")


def itemsize(name: str) -> int:
    """Bytes per element of the dtype `name`."""
    return _SIZES[name]


def parse(text: str) -> str:
    """The output dtype that a user means by `text`, such as `bf16` or `bfloat16`."""
    name = text.strip().lower().removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in OUTPUTS:
        raise WeftError(f"unknown output dtype {text!r}", f"one of {', '.join(OUTPUTS)}")
    return name


def promote(names: Iterable[str]) -> str:
    """The narrowest dtype that holds every value of all of them, as torch has it."""
    found = list(dict.fromkeys(names))
    if len(found) == 1:
        return found[0]
    floating = [name for name in WEIGHTS if name in found]
    if not floating:
        return max(found, key=itemsize)
    # Neither half holds the other's values.
    return "float32" if floating == ["bfloat16", "float16"] else floating[0]
