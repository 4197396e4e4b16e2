"""Merges of small tensors that the tests and the script that asks MergeKit both make.

NumPy alone: the script runs where Weft is not installed.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One merge.

    Attributes:
        name: Unique; it also seeds the inputs.
        count: How many inputs, the base aside.
        base: Whether there is one.
        params: Shared parameters.
        each: A list for each parameter that every input has its own of.
        kind: How the inputs are made, see `tensors`.
        shape: Of them.
    """

    name: str
    method: str
    count: int = 2
    base: bool = True
    params: dict[str, Any] = field(default_factory=dict)
    each: dict[str, list[Any]] = field(default_factory=dict)
    kind: str = "normal"
    shape: tuple[int, ...] = (12, 20)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 values of no more than 8 significant bits."""
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype("<u4").view("<f4")


def tensors(case: Case) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """-> the base, if there is one, and the inputs, float32.

    Kinds: `normal` (changes as large as the weights), `near` (small changes), `faint` (very small,
    each larger than the one before it), `bfloat16` (rounded, so that many changes are of the same
    magnitude), `same` (the first input is the base),
    `zero` (all inputs are), `opposite` (the second change is the first with the other sign).
    """
    draw = np.random.RandomState(zlib.crc32(case.name.encode()))
    base = draw.standard_normal(case.shape).astype(np.float32)
    size = {"near": 0.01, "bfloat16": 0.02, "faint": 1e-4, "normal": 0.5}.get(case.kind, 0.5)
    changes = [size * draw.standard_normal(case.shape) for _ in range(case.count)]
    if case.kind == "zero" or (case.kind == "same" and not case.base):
        changes = [np.zeros(case.shape) for _ in changes]
    elif case.kind == "same":
        changes[0][:] = 0
    elif case.kind == "faint":
        changes = [number * change for number, change in enumerate(changes, 1)]
    elif case.kind == "opposite":
        # Multiples of 1/64 are added without rounding.
        base = np.round(base * 64) / 64
        changes = [np.round(change * 64) / 64 for change in changes]
        changes[1] = -changes[0]
    inputs = [(base + change).astype(np.float32) for change in changes]
    if case.kind == "bfloat16":
        base, inputs = bfloat16(base), [bfloat16(each) for each in inputs]
    return (base.astype(np.float32) if case.base else None), inputs


SHAPES = {"vector": (37,), "stack": (3, 5, 8), "filters": (7, 2, 3, 8)}
ARITHMETIC = {
    "plain": {},
    "three": {"count": 3, "each": {"weight": [0.5, -0.3, 1.2]}},
    "one": {"count": 1, "each": {"weight": [0.7]}},
    "scaled": {"params": {"lambda": 0.6, "int8_mask": True}},
    "normalize": {"params": {"normalize": True}},
    "no normalize": {"params": {"normalize": False}},
    "cancelling weights": {
        "each": {"weight": [1.0, -1.0]},
        "params": {"normalize": True},
    },
    "bfloat16": {"kind": "bfloat16", "each": {"weight": [1.0, 1.0]}},
    "same": {"kind": "same"},
    "zero": {"kind": "zero"},
    "opposite": {"kind": "opposite", "each": {"weight": [1.0, 1.0]}},
    "vector": {"shape": SHAPES["vector"]},
    "stack": {"shape": SHAPES["stack"]},
}
DENSITIES = {
    "density 0": {"each": {"density": [0.0, 0.5]}},
    "density 0.3": {"each": {"density": [0.3, 0.3]}},
    "densities": {"each": {"density": [1.0, 0.1]}},
    "least": {"each": {"density": [0.0001, 0.0001]}},
    "rescale": {"params": {"rescale": True}, "each": {"density": [0.4, 0.6]}},
    "ties": {"kind": "bfloat16", "each": {"density": [0.37, 0.61]}},
    "vector 0.3": {"shape": SHAPES["vector"], "each": {"density": [0.3, 0.8]}},
    "stack 0.3": {"shape": SHAPES["stack"], "each": {"density": [0.3, 0.8]}},
}
OUTLIERS = {
    "gamma 0": {"each": {"density": [0.4, 0.5], "gamma": [0.0, 0.0]}},
    "gamma 0.2": {"each": {"density": [0.4, 0.5], "gamma": [0.2, 0.3]}},
    "too much gamma": {"each": {"density": [0.9, 0.8], "gamma": [0.3, 0.25]}},
    "ties gamma": {"kind": "bfloat16", "each": {"density": [0.5, 0.3], "gamma": [0.11, 0.2]}},
}


def _arithmetic(method: str, *groups: dict[str, dict[str, Any]]) -> list[Case]:
    cases = []
    for group in groups:
        for name, given in group.items():
            each = {"weight": [0.6, 0.8][: given.get("count", 2)], **given.get("each", {})}
            cases.append(Case(f"{method}: {name}", method, **{**given, "each": each}))
    return cases


def _own(method: str, cases: dict[str, dict[str, Any]]) -> list[Case]:
    return [Case(f"{method}: {name}", method, **given) for name, given in cases.items()]


WEIGHTS = {"each": {"weight": [0.3, 0.9]}}
DETERMINISTIC = [
    *_own(
        "linear",
        {
            "two": {"base": False, **WEIGHTS},
            "no normalize": {"base": False, "params": {"normalize": False}, **WEIGHTS},
            "three": {"base": False, "count": 3, "each": {"weight": [1.0, -0.2, 0.5]}},
            "one": {"base": False, "count": 1, "each": {"weight": [0.4]}},
            "stack": {"base": False, "shape": SHAPES["stack"], **WEIGHTS},
        },
    ),
    *_own(
        "slerp",
        {
            "apart": {"count": 1, "params": {"t": 0.3}},
            "near": {"count": 1, "params": {"t": 0.3}, "kind": "near"},
            "zero t": {"count": 1, "params": {"t": 0.0}},
            "beyond": {"count": 1, "params": {"t": 1.4}},
            "same": {"count": 1, "params": {"t": 0.5}, "kind": "same"},
            "vector": {"count": 1, "params": {"t": 0.8}, "shape": SHAPES["vector"]},
            "stack": {"count": 1, "params": {"t": 0.6}, "shape": SHAPES["stack"]},
        },
    ),
    *_own(
        "nuslerp",
        {
            f"{flatten=} {row=} {base=} {shape}": {
                "params": {"nuslerp_flatten": flatten, "nuslerp_row_wise": row},
                "base": base,
                "shape": size,
                **WEIGHTS,
            }
            for flatten in (True, False)
            for row in (False, True)
            for base in (True, False)
            for shape, size in {"matrix": (12, 20), **SHAPES}.items()
            if flatten <= (not row) and not (row and shape == "stack")
        },
    ),
    *_own(
        "nuslerp",
        {
            "cancelling": {"each": {"weight": [1.0, -1.0]}},
            "opposite": {"kind": "opposite", **WEIGHTS},
            "same": {"kind": "same", **WEIGHTS},
            "same rows": {"kind": "same", "params": {"nuslerp_flatten": False}, **WEIGHTS},
            "near": {"kind": "near", "base": False, **WEIGHTS},
        },
    ),
    *_own(
        "multislerp",
        {
            "two": WEIGHTS,
            "three": {"count": 3, "each": {"weight": [0.3, 0.5, 1.0]}},
            "no base": {"count": 3, "base": False, "each": {"weight": [0.3, 0.5, 1.0]}},
            "no normalize": {"params": {"normalize_weights": False}, **WEIGHTS},
            "eps": {"params": {"eps": 0.01}, **WEIGHTS},
            "one": {"count": 1, "each": {"weight": [0.3]}},
            "opposite": {"kind": "opposite", "each": {"weight": [0.5, 0.5]}},
            "same": {"kind": "same", **WEIGHTS},
            "stack": {"shape": SHAPES["stack"], **WEIGHTS},
        },
    ),
    *_own(
        "karcher",
        {
            "two": {"base": False},
            "four": {"base": False, "count": 4},
            "one": {"base": False, "count": 1},
            "near": {"base": False, "kind": "near", "count": 3},
            "same": {"base": False, "kind": "same", "count": 3},
            "short": {"base": False, "count": 3, "params": {"max_iter": 1}},
            "rough": {"base": False, "count": 3, "params": {"tol": 0.1}},
            "vector": {"base": False, "shape": SHAPES["vector"]},
        },
    ),
    *_arithmetic("task_arithmetic", ARITHMETIC),
    *_arithmetic("ties", ARITHMETIC, DENSITIES),
    *_arithmetic("breadcrumbs", ARITHMETIC, DENSITIES, OUTLIERS),
    *_arithmetic("breadcrumbs_ties", DENSITIES, OUTLIERS),
    *_arithmetic("dare_ties", ARITHMETIC),
    *_arithmetic("dare_linear", ARITHMETIC),
    *_arithmetic("della", ARITHMETIC),
    *_arithmetic("della_linear", ARITHMETIC),
    *_own(
        "sce",
        {
            "all": {"count": 3},
            "some": {"count": 3, "params": {"select_topk": 0.4, "int8_mask": True}},
            "none": {"params": {"select_topk": 0.0}},
            "near": {"kind": "near", "params": {"select_topk": 0.7}},
            "tiny": {"kind": "bfloat16", "params": {"select_topk": 1.0}},
            "zero": {"kind": "zero", "params": {"select_topk": 0.5}},
            "faint": {"count": 3, "kind": "faint"},
            "faint, some": {"count": 3, "kind": "faint", "params": {"select_topk": 0.4}},
            "one": {"count": 1, "params": {"select_topk": 0.5}},
            "same": {"kind": "same", "count": 3, "params": {"select_topk": 0.5}},
            "stack": {"shape": SHAPES["stack"], "params": {"select_topk": 0.5}},
        },
    ),
    *_own(
        "model_stock",
        {
            f"{filter_wise=} {count} {shape}": {
                "count": count,
                "params": {"filter_wise": filter_wise},
                "shape": size,
            }
            for filter_wise in (False, True)
            for count in (2, 3)
            for shape, size in {"matrix": (12, 20), **SHAPES}.items()
        },
    ),
    *_own(
        "model_stock",
        {
            "near": {"kind": "near", "count": 3},
            "zero": {"kind": "zero"},
            "opposite": {"kind": "opposite"},
            "opposite rows": {"kind": "opposite", "params": {"filter_wise": True}},
        },
    ),
    *_own(
        "nearswap",
        {
            "some": {"count": 1, "params": {"t": 0.2}},
            "tiny": {"count": 1, "params": {"t": 1e-7}, "kind": "same"},
            "negative": {"count": 1, "params": {"t": -0.2}},
            "near": {"count": 1, "params": {"t": 0.003}, "kind": "near"},
        },
    ),
    *_own(
        "arcee_fusion",
        {
            "matrix": {"count": 1},
            "vector": {"count": 1, "shape": SHAPES["vector"]},
            "stack": {"count": 1, "shape": SHAPES["stack"]},
            "zero": {"count": 1, "kind": "zero"},
            "larger": {"count": 1, "shape": (40, 31)},
        },
    ),
    *_own(
        "passthrough",
        {
            "plain": {"count": 1, "base": False},
            "scaled": {"count": 1, "base": False, "each": {"scale": [0.25]}},
            "zero": {"count": 1, "base": False, "each": {"scale": [0.0]}},
            "none": {"count": 1, "base": False, "each": {"scale": [None]}},
        },
    ),
    *_own(
        "ram",
        {
            "plain": {"count": 3},
            "epsilon": {"count": 3, "params": {"epsilon": 0.4}},
            "ties": {"count": 3, "kind": "bfloat16", "params": {"epsilon": 0.0078125}},
            "one": {"count": 1, "params": {"epsilon": 0.4}},
        },
    ),
    *_own(
        "ramplus_tl",
        {
            "plain": {"count": 3},
            "epsilon": {"count": 3, "params": {"epsilon": 0.4}},
            "all": {"count": 3, "params": {"epsilon": 0.8, "r": 0.7, "alpha": 5.0}},
            "ties": {"count": 3, "kind": "bfloat16", "params": {"epsilon": 0.0078125}},
            "none unique": {"count": 2, "kind": "zero"},
        },
    ),
]

# Where Weft differs on purpose.
APART = [
    Case(
        "nuslerp: columns of a stack",
        "nuslerp",
        params={"nuslerp_flatten": False, "nuslerp_row_wise": True},
        shape=SHAPES["stack"],
        **WEIGHTS,
    )
]
# Drawn again and again: what is compared is the mean and the standard deviation of each element.
HALF = {"each": {"density": [0.5, 0.8]}, "shape": (4, 12)}
AS_DROPPED = {"params": {"rescale": False}, "each": {"density": [0.7, 0.4]}, "shape": (4, 12)}
RANDOM = [
    *_arithmetic("dare_ties", {"random": HALF, "random no rescale": AS_DROPPED}),
    *_arithmetic("dare_linear", {"random": HALF}),
    *_arithmetic("della", {"random": HALF, "random no rescale": AS_DROPPED}),
    *_arithmetic("della_linear", {"random": HALF, "random vector": {**HALF, "shape": (15,)}}),
    *_arithmetic("della", {"random stack": {**HALF, "shape": (2, 9, 4)}}),
    *_arithmetic("della_linear", {"random filters": {**HALF, "shape": (3, 6, 2, 2)}}),
]
DRAWS = 200
