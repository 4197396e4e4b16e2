"""The arithmetic of a difference: bytes of A and of B in, sums out; numpy alone.

Bytes that are equal need none. Elsewhere A − B is taken in float32 (in float64 for float64 and
integers); squares are summed in short runs in the same dtype, and from there on in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.core.dtypes import WEIGHTS, itemsize
from weft.core.sums import dot_of_arrays
from weft.execute._sides import FLOATING, Buffers, native, widen, working

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from weft.execute._sides import Raw, Values

NEAR = 2**19  # elements: the interpreter's lock is asked for seldom, and the cache still holds them
# Smaller squares may have lost digits to underflow, larger ones to overflow: done in float64.
_TINY, _HUGE = 1e-28, 1e37


@dataclass(frozen=True, slots=True)
class Sums:
    """Over some elements of a pair.

    Attributes:
        changed: How many differ.
        difference, base: ‖A − B‖², ‖B‖².
        largest: max |A − B|.
        not_finite: NaN and infinite elements of A and of B, where blocks differ.
        unrounded: How many of the wider dtype do not round to what the narrower has.
        left: Ranges of equal bytes, whose ‖B‖² is not in `base` yet.
    """

    changed: int = 0
    difference: float = 0.0
    base: float = 0.0
    largest: float = 0.0
    not_finite: tuple[int, int] = (0, 0)
    unrounded: int = 0
    left: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.changed + other.changed,
            self.difference + other.difference,
            self.base + other.base,
            max(self.largest, other.largest),
            (self.not_finite[0] + other.not_finite[0], self.not_finite[1] + other.not_finite[1]),
            self.unrounded + other.unrounded,
            self.left + other.left,
        )


def sums(a: Raw, b: Raw, dtypes: tuple[str, str], buffers: Buffers) -> Sums:
    """Of blocks that are not equal to the byte."""
    kind = working(*dtypes)
    A, B = _widened(a, b, dtypes, buffers, kind)
    mask = buffers.get("mask", A.size, "?")
    found = _fast(B, np.subtract(A, B, out=A), mask)
    if dtypes[0] == dtypes[1] in FLOATING and _sound(found):
        return found
    A, B = _widened(a, b, dtypes, buffers, kind)  # in whose place the difference was
    if not _sound(found):
        found = _careful(A, B)
    if kind == "f8" and dtypes[0] == dtypes[1] != "float64":
        # Integers beyond 2⁵³: float64 cannot tell all of them apart.
        np.not_equal(native(a, dtypes[0]), native(b, dtypes[1]), out=mask)
        found = Sums(int(np.count_nonzero(mask)), found.difference, found.base, found.largest)
    if dtypes[0] == "complex64" and found.changed:
        both = ~((A == B) | (np.isnan(A) & np.isnan(B)))
        changed = int(np.count_nonzero(both.reshape(-1, 2).any(axis=1)))
        found = found + Sums(changed - found.changed)
    if dtypes[0] != dtypes[1] and found.changed:
        return found + Sums(unrounded=_unrounded((a, b), dtypes, (A, B)))
    return found


def base(raw: Raw, dtype: str, buffers: Buffers) -> float:
    """‖B‖²."""
    kind = working(dtype, dtype)
    B = widen(raw, dtype, buffers.get("B", native(raw, dtype).size, kind))
    square = dot_of_arrays(B, B)
    if _TINY < square < _HUGE:
        return square
    wide = B.astype("f8")
    finite = np.where(np.isfinite(wide), wide, 0.0)
    return dot_of_arrays(finite, finite)


def difference(
    a: Raw, b: Raw, dtypes: tuple[str, str], buffers: Buffers, scale: float
) -> NDArray[np.float32]:
    """(A − B) · scale in float32."""
    kind = working(*dtypes)
    A, B = _widened(a, b, dtypes, buffers, kind)
    np.subtract(A, B, out=A)
    np.multiply(A, A.dtype.type(scale), out=A)
    if kind == "f4":
        return A
    out: NDArray[np.float32] = buffers.get("D", A.size, "f4")
    np.copyto(out, A, casting="unsafe")
    return out


def _widened(
    a: Raw, b: Raw, dtypes: tuple[str, str], buffers: Buffers, kind: str
) -> tuple[Values, Values]:
    A = widen(a, dtypes[0], buffers.get("A", native(a, dtypes[0]).size, kind))
    return A, widen(b, dtypes[1], buffers.get("B", native(b, dtypes[1]).size, kind))


def same_bytes(a: Raw, b: Raw) -> bool:
    """Whether all are equal; what differs mostly does so at once."""
    return a[:64].tobytes() == b[:64].tobytes() and np.array_equal(a, b)


def _fast(B: Values, D: Values, mask: NDArray[np.bool_]) -> Sums:
    np.not_equal(D, 0, out=mask)
    largest = max(float(D.max(initial=0)), -float(D.min(initial=0)))
    return Sums(int(np.count_nonzero(mask)), dot_of_arrays(D, D), dot_of_arrays(B, B), largest)


def _sound(found: Sums) -> bool:
    """No NaN, no infinity, and no square that went under or over."""
    if not found.changed:
        return math.isfinite(found.difference) and found.base < _HUGE
    return _TINY < found.difference < _HUGE and _TINY < found.base < _HUGE


def _careful(A: Values, B: Values) -> Sums:
    """In float64, and around what is not finite."""
    one, other = A.astype("f8"), B.astype("f8")
    sound = np.isfinite(one), np.isfinite(other)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    D = np.where(sound[0] & sound[1], one - other, 0.0)
    B = np.where(sound[1], other, 0.0)
    largest = max(float(D.max(initial=0)), -float(D.min(initial=0)))
    return Sums(
        int(np.count_nonzero(~same)),
        dot_of_arrays(D, D),
        dot_of_arrays(B, B),
        largest,
        (int(np.count_nonzero(~sound[0])), int(np.count_nonzero(~sound[1]))),
    )


def _unrounded(raw: tuple[Raw, Raw], dtypes: tuple[str, str], values: tuple[Any, Any]) -> int:
    """How many elements of the wider side do not round to what the narrower has.

    Every one, where neither dtype is the wider, or rounding is not defined between the two.
    """
    wide = 0 if itemsize(dtypes[0]) > itemsize(dtypes[1]) else 1
    narrow = dtypes[1 - wide]
    floating = set(dtypes) <= set(WEIGHTS)
    if not floating or itemsize(dtypes[wide]) == itemsize(narrow):
        return len(values[0])
    exact, there = values[wide], values[1 - wide]
    if narrow == "bfloat16":
        # Float64 goes there by way of float32, as torch has it.
        bits = exact.astype(np.float32).view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)
        rounded = (bits & 0xFFFF0000).view(np.float32)
    else:
        rounded = exact.astype(native(raw[1 - wide], narrow).dtype)
    same = (rounded == there) | (np.isnan(exact) & np.isnan(there))
    return int(np.count_nonzero(~same))
