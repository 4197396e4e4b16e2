"""Loops compiled from `kernels.c`: the arithmetic of weights, without passes that torch would need.

They are there where a C compiler was when Weft was installed. Whoever calls them has the same in
torch, for GPUs, float64 and other dtypes that `takes` says no to. The interpreter's lock is free
meanwhile. At most `MOST` operands go into one call.

Tensors are torch's, contiguous, on the CPU, or `Numbers`, for which torch need not be loaded; what
is not called an operand or `out` is float32.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from weft.native import build
from weft.native.build import MOST as MOST
from weft.native.numbers import Numbers as Numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    Flat = Tensor | Numbers

_FUNCTIONS = (
    "gram", "widen", "difference", "finish", "combine", "norms", "vote", "between", "philox",
)  # fmt: skip
_KINDS = {"float32": 0, "bfloat16": 1, "float16": 2}


@dataclass(frozen=True, slots=True)
class Operand:
    """`values` − `less` + `more`, where these are given: flat tensors of as many elements.

    The first two are float32, bfloat16 or float16, `more` is float32.
    """

    values: Flat
    less: Flat | None = None
    more: Flat | None = None

    def part(self, here: slice) -> Operand:
        """Of some of the elements."""
        return Operand(*(None if each is None else each[here] for each in self.tensors))  # type: ignore[arg-type]

    @property
    def tensors(self) -> tuple[Flat, Flat | None, Flat | None]:
        return self.values, self.less, self.more


@dataclass(frozen=True, slots=True)
class Keep:
    """Of a task vector d: low < |d| ≤ high, and where `bits` are given, those that are set.

    Attributes:
        bits: As NumPy's `packbits` gives them.
        first: Which of them is that of the first element.
    """

    low: float = -1.0
    high: float = math.inf
    bits: Any = None
    first: int = 0


class _Keep(ctypes.Structure):
    _fields_ = (
        ("bits", ctypes.c_void_p),
        ("first", ctypes.c_size_t),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    )


class _Operand(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("less", ctypes.c_void_p),
        ("more", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("less_kind", ctypes.c_int32),
    )


class Proof(ctypes.Structure):
    """‖W‖², ‖ΔW‖², ‖error‖², whether anything changed, and whether anything is not finite."""

    _fields_ = (
        ("base", ctypes.c_double),
        ("delta", ctypes.c_double),
        ("error", ctypes.c_double),
        ("changed", ctypes.c_int32),
        ("not_finite", ctypes.c_int32),
    )
    base: float
    delta: float
    error: float
    changed: int
    not_finite: int


@cache
def library() -> ctypes.CDLL | None:
    """What was compiled, or None."""
    try:
        found = ctypes.CDLL(str(build.library()))
    except OSError:
        return None
    for name in _FUNCTIONS:
        getattr(found, f"weft_{name}").restype = None
    return found


@cache
def _kinds() -> dict[Any, int]:
    """By torch's dtypes: their names take longer to make than small blocks to compute."""
    import torch

    return {getattr(torch, name): kind for name, kind in _KINDS.items()}


def reads(dtype: str) -> bool:
    """Whether tensors of `dtype` can be given to the functions below."""
    return dtype in _KINDS and library() is not None


def takes(*tensors: Flat | Operand | None) -> bool:
    """Whether these can be given to the functions below."""
    if library() is None:
        return False
    for each in tensors:
        for part in each.tensors if isinstance(each, Operand) else (each,):
            if part is not None and (_kind(part) < 0 or not part.is_cpu):
                return False
    return True


def gram(operands: Sequence[Operand]) -> list[list[float]]:
    """⟨xᵢ, xⱼ⟩ of all i and j ≤ i: products are added in float32 by 32, and then in float64."""
    count = len(operands)
    found = (ctypes.c_double * (count * (count + 1) // 2))()
    _call("gram", ctypes.c_size_t(count), _array(operands), _size(operands[0].values), found)
    return [list(found[n * (n + 1) // 2 : (n + 1) * (n + 2) // 2]) for n in range(count)]


def widen(operand: Operand, out: Tensor) -> None:
    """Into `out`, float32."""
    _call("widen", _array([operand]), _size(out), _wide(out))


def difference(
    operand: Operand, out: Tensor | None, rough: Tensor | None
) -> tuple[float, float, float]:
    """D = values − less into `out`, and into `rough` (bfloat16), where they are given.

    Returns ‖d‖², ⟨d, less⟩ and ‖less‖², summed as in `gram`.
    """
    sums = (ctypes.c_double * 3)()
    _call("difference", _array([operand]), _size(operand.values), _wide(out), _at(rough), sums)
    return sums[0], sums[1], sums[2]


def finish(
    value: Tensor | None,
    base: Operand | None,
    delta: Tensor | None,
    out: Flat,
    *,
    exact: bool,
) -> Proof:
    """Round `value` into `out`, and take its proof against `base` W.

    Args:
        value: float32; None is W + `delta`.
        base: W; without it only `not_finite` is told.
        delta: ΔW in float32; None is `value` − W.
        out: Of any of the dtypes.
        exact: The error is `out` − `value`; else it is (`out` − W) − ΔW.
    """
    found = Proof()
    operand = _array([base]) if base is not None else None
    _call(
        "finish", _wide(value), operand, _wide(delta), _size(out), ctypes.c_int(exact), _at(out),
        ctypes.c_int(_kind(out)), ctypes.byref(found),
    )  # fmt: skip
    return found


def combine(
    operands: Sequence[Operand],
    factors: Sequence[float],
    base: Operand | None,
    share: float,
    out: Flat,
) -> Proof:
    """Σ factorᵢ · xᵢ + share · W, rounded into `out`, and its proof against `base` W."""
    found = Proof()
    operand = _array([base]) if base is not None else None
    _call(
        "combine", ctypes.c_size_t(len(operands)), _array(operands),
        _floats(factors), operand, ctypes.c_float(share), _size(out),
        _at(out), ctypes.c_int(_kind(out)), ctypes.byref(found),
    )  # fmt: skip
    return found


def norms(operand: Operand, keep: Keep) -> tuple[float, float]:
    """Σ |d| of all elements, and of those that are kept, summed as in `gram`."""
    found = (ctypes.c_double * 2)()
    _call("norms", _array([operand]), _keeps([keep]), _size(operand.values), found)
    return found[0], found[1]


def vote(
    operands: Sequence[Operand],
    keeps: Sequence[Keep],
    factors: Sequence[float],
    weights: Sequence[float] | None,
    scale: float,
    base: Operand,
    out: Flat,
    *,
    consensus: bool,
    proof: Proof,
) -> None:
    """W + scale · Σ factorᵢ · kept dᵢ, rounded into `out`, and `proof` added to, against `base` W.

    By `consensus` only those count in an element whose sign is that of the sum of all; with
    `weights` their sum is divided by the weights of those.
    """
    _call(
        "vote", ctypes.c_size_t(len(operands)), _array(operands), _keeps(keeps), _floats(factors),
        None if weights is None else _floats(weights), ctypes.c_float(scale),
        ctypes.c_int(consensus), _array([base]), _size(out), _at(out),
        ctypes.c_int(_kind(out)), ctypes.byref(proof),
    )  # fmt: skip


def between(keys: Any, low: float, high: float, out: Any) -> tuple[int, int]:
    """Of `keys` (float32) those from `low` to `high` into `out`: how many, and how many are above.

    `out` has room for all.
    """
    counts = (ctypes.c_size_t * 2)()
    _call(
        "between", ctypes.c_void_p(keys.ctypes.data), ctypes.c_size_t(keys.size),
        ctypes.c_float(low), ctypes.c_float(high), ctypes.c_void_p(out.ctypes.data), counts,
    )  # fmt: skip
    return counts[0], counts[1]


def philox(key: int, counter: int, out: Any) -> None:
    """The raw words that NumPy's `Philox(key=key, counter=counter)` gives, into `out` (uint64).

    As many as `out` has, a multiple of four.
    """
    low, high = key & (2**64 - 1), key >> 64
    words = map(ctypes.c_uint64, (low, high, counter))
    _call("philox", *words, ctypes.c_size_t(out.size // 4), ctypes.c_void_p(out.ctypes.data))


def _call(name: str, *arguments: Any) -> None:
    found = library()
    assert found is not None
    getattr(found, f"weft_{name}")(*arguments)


def _array(operands: Sequence[Operand]) -> Any:
    found = (_Operand * len(operands))()
    for each, operand in zip(found, operands, strict=True):
        each.values, each.kind = operand.values.data_ptr(), _kind(operand.values)
        if operand.less is not None:
            each.less, each.less_kind = operand.less.data_ptr(), _kind(operand.less)
        if operand.more is not None:
            each.more = operand.more.data_ptr()
    return found


def _keeps(keeps: Sequence[Keep]) -> Any:
    found = (_Keep * len(keeps))()
    for each, keep in zip(found, keeps, strict=True):
        each.bits = None if keep.bits is None else keep.bits.ctypes.data
        each.first, each.low, each.high = keep.first, keep.low, keep.high
    return found


def _floats(values: Sequence[float]) -> Any:
    return (ctypes.c_float * len(values))(*values)


def _kind(tensor: Flat) -> int:
    """−1 of a dtype that is none of the three."""
    kinds: dict[Any, int] = _KINDS if isinstance(tensor, Numbers) else _kinds()
    return kinds.get(tensor.dtype, -1)


def _at(tensor: Flat | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _wide(tensor: Flat | None) -> ctypes.c_void_p:
    assert tensor is None or (_kind(tensor) == 0 and tensor.is_contiguous())
    return _at(tensor)


def _size(tensor: Flat) -> ctypes.c_size_t:
    return ctypes.c_size_t(tensor.numel())
