"""Every method against its formula, in float64 with NumPy, whole tensors at once."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from memory_blocks import merge, merge_case, task_of
from merge_cases import DETERMINISTIC, Case, tensors

from weft import methods
from weft.core.errors import NumericsError

Array = np.ndarray


def kept(size: Array, case: Case, number: int) -> Array:
    """Which elements a sparsifier keeps, by a stable sort."""
    density = case.each.get("density", [1.0] * case.count)[number]
    n = size.size
    if density >= 1 or case.method == "task_arithmetic":
        return np.ones(size.shape, bool)
    mask = np.zeros(n, bool)
    if density > 0 and case.method == "ties":
        mask[np.argsort(-size.ravel(), kind="stable")[: max(1, int(density * n))]] = True
    elif density > 0:
        target = int(density * n)
        top = int(case.each.get("gamma", [0.01] * case.count)[number] * n)
        first = max(0, n - target - top)
        mask[np.argsort(size.ravel(), kind="stable")[first : first + target]] = True
    return mask.reshape(size.shape)


def arithmetic(case: Case, base: Array, changes: list[Array]) -> Array:
    own = methods.method(case.method).PARAMETERS
    params = {name: own[name].default for name in ("lambda", "normalize", "rescale")} | case.params
    total, votes = [], []
    for number, change in enumerate(changes):
        mask = kept(np.abs(change), case, number)
        thin = change * mask
        before, after = np.abs(change).sum(), np.abs(thin).sum()
        if params["rescale"] and not mask.all() and min(before, after) >= 1e-7:
            thin = thin * before / after
        total.append(case.each["weight"][number] * thin)
    weights = np.array(case.each["weight"]).reshape(-1, *[1] * base.ndim)
    stacked = np.stack(total)
    if case.method in ("ties", "breadcrumbs_ties", "dare_ties", "della"):
        sign = np.where(stacked.sum(0) >= 0, 1, -1)
        votes = np.sign(stacked) == sign
        mixed, share = (stacked * votes).sum(0), (weights * votes).sum(0)
        share = np.where(np.abs(share) < 1e-12, 1, share)
    else:
        mixed, share = stacked.sum(0), weights.sum(0)
        share = np.where(np.abs(share) < 1e-8, 1, share)
    return base + params["lambda"] * (mixed / share if params["normalize"] else mixed)


def rotated(t: float, one: Array, other: Array, axis: int | None, straight: float) -> Array:
    norms = [np.linalg.norm(each, axis=axis, keepdims=axis is not None) for each in (one, other)]
    safe = [np.where(norm > 1e-8, norm, 1) for norm in norms]
    cosine = np.clip((one * other).sum(axis, keepdims=axis is not None) / safe[0] / safe[1], -1, 1)
    line = np.abs(cosine) > straight
    theta = np.arccos(np.where(line, 0, cosine))
    a, b = (np.sin(part * theta) / np.sin(theta) for part in (1 - t, t))
    return np.where(line, 1 - t, a) * one + np.where(line, t, b) * other


def nuslerp(case: Case, base: Array, changes: list[Array]) -> Array:
    one, other = case.each["weight"]
    t = 0.5 if abs(one + other) < 1e-6 else other / (one + other)
    axis: int | None = 0 if case.params.get("nuslerp_row_wise") else -1
    if case.params.get("nuslerp_flatten", True):
        axis = None
    return base + rotated(t, changes[0], changes[1], axis, 1 - 2**-25)


def multislerp(case: Case, base: Array, changes: list[Array]) -> Array:
    """As published: to the tangent space and back."""
    if len(changes) == 1:
        return base + changes[0]
    weights = np.array(case.each["weight"])
    weights = weights / weights.sum() if case.params.get("normalize_weights", True) else weights
    eps = case.params.get("eps", 1e-8)
    norms = [np.linalg.norm(change) for change in changes]
    units = [change / (norm + eps) for change, norm in zip(changes, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    if np.linalg.norm(mean) < eps:
        return base + sum(w * d for w, d in zip(weights, changes, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    length = np.linalg.norm(tangent) + eps
    turned = mean * np.cos(length) + tangent * np.sin(length) / length
    return base + turned * (weights * norms).sum()


def karcher(case: Case, inputs: list[Array]) -> Array:
    if len(inputs) == 1:
        return inputs[0]
    tol = case.params.get("tol", 1e-5)
    units = [each / np.linalg.norm(each) for each in inputs]
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(case.params.get("max_iter", 10)):
        step = np.zeros_like(mean)
        for unit in units:
            inner = np.clip((mean * unit).sum(), -1, 1)
            theta = np.arccos(inner)
            if theta >= tol:
                step += theta / np.sin(theta) * (unit - inner * mean) / len(units)
        angle = np.linalg.norm(step)
        if angle < tol:
            break
        mean = np.cos(angle) * mean + np.sin(angle) * step / angle
        mean /= np.linalg.norm(mean)
    return mean * np.mean([np.linalg.norm(each) for each in inputs])


def sce(case: Case, base: Array, changes: list[Array]) -> Array:
    stacked = np.stack(changes)
    if (share := case.params.get("select_topk", 1.0)) < 1:
        variance = stacked.var(0)
        mask = np.zeros(base.size, bool)
        count = int(np.count_nonzero(variance) * share)
        mask[np.argsort(-variance.ravel(), kind="stable")[:count]] = True
        stacked = stacked * mask.reshape(base.shape)
    squares = (stacked**2).reshape(len(changes), -1).mean(1)
    even = np.full(len(changes), 1 / len(changes))
    weights = squares / squares.sum() if squares.sum() >= 1e-6 else even
    votes = np.sign(stacked) == np.where(stacked.sum(0) >= 0, 1, -1)
    erased = weights.reshape(-1, *[1] * base.ndim) * votes
    return base + (stacked * erased).sum(0) / np.maximum(erased.sum(0), 1e-6)


def model_stock(case: Case, base: Array, changes: list[Array]) -> Array:
    axis = -1 if case.params.get("filter_wise") else None
    norms = [np.linalg.norm(each, axis=axis, keepdims=axis is not None) for each in changes]
    cosine: Any = 0
    for i, j in combinations(range(len(changes)), 2):
        inner = (changes[i] * changes[j]).sum(axis, keepdims=axis is not None)
        cosine = cosine + np.clip(inner / np.maximum(norms[i] * norms[j], 1e-6), -1, 1)
    cosine = cosine / math.comb(len(changes), 2)
    below = 1 + (len(changes) - 1) * cosine
    t = np.where(np.abs(below) < 1e-6, 0, len(changes) * cosine / np.where(below == 0, 1, below))
    return t * (base + sum(changes) / len(changes)) + (1 - t) * base


def fusion(base: Array, change: Array) -> Array:
    def soft(values: Array) -> Array:
        powers = np.exp(values - values.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True) + 1e-8

    p, q = soft(base + change), soft(base)
    importance = np.abs(change) * (p * np.log(p / q)).sum(-1, keepdims=True)
    order = np.sort(importance.ravel())
    low, middle, high = (order[k * (order.size - 1) // 4] for k in (1, 2, 3))
    return base + change * (importance >= middle + 1.5 * (high - low))


def ram(case: Case, base: Array, changes: list[Array]) -> Array:
    epsilon = np.float32(case.params.get("epsilon", 1e-5))
    active = np.abs(np.stack(changes)) > epsilon
    count = active.sum(0)
    merged = base
    for change, own in zip(changes, active, strict=True):
        alone, shared = own & (count == 1), own & (count > 1)
        factor = 1.0
        if case.method == "ramplus_tl":
            ratio = shared.sum() / max(alone.sum(), epsilon)
            alpha = case.params.get("alpha", 0.2)
            factor += case.params.get("r", 0.1) * min(ratio, alpha)
        merged = merged + factor * change * alone + change * shared / np.maximum(count, 1)
    return merged


def truth(case: Case) -> Array:
    base32, inputs32 = tensors(case)
    base = np.zeros(case.shape) if base32 is None else base32.astype(np.float64)
    inputs = [each.astype(np.float64) for each in inputs32]
    changes = [each - base for each in inputs]
    match case.method:
        case "linear":
            total = sum(w * x for w, x in zip(case.each["weight"], inputs, strict=True))
            return total / (sum(case.each["weight"]) if case.params.get("normalize", True) else 1)
        case "passthrough":
            scale = case.each.get("scale", [None])[0]
            return inputs[0] if scale is None else scale * inputs[0]
        case "slerp":
            return rotated(case.params["t"], base, inputs[0], None, 0.9995)
        case "nearswap":
            size = np.maximum(np.abs(changes[0]), 1e-6)
            return base + np.clip(case.params["t"] / size, 0, 1) * changes[0]
        case "arcee_fusion":
            return fusion(base, changes[0])
        case "karcher":
            return karcher(case, inputs)
        case "ram" | "ramplus_tl":
            return ram(case, base, changes)
    own = {"nuslerp": nuslerp, "multislerp": multislerp, "sce": sce, "model_stock": model_stock}
    return own.get(case.method, arithmetic)(case, base, changes)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=lambda case: case.name)
def test_float64_is_the_formula(case: Case) -> None:
    """In float64, where rounding hides nothing; the cut of the tensor included."""
    expected = torch.from_numpy(truth(case))
    for size in (10**6, 60):
        error = (merge_case(case, torch.float64, size=size) - expected).norm()
        assert float(error) <= 1e-9 * float(expected.norm())


@pytest.mark.parametrize("name", methods.names())
def test_no_result_depends_on_the_cut(name: str) -> None:
    """Bit for bit where the map's blocks differ; sums may round in another order, no more."""
    for case in [case for case in DETERMINISTIC if case.method == name]:
        whole = merge_case(case)
        for size in (20, 60, 100):
            assert torch.equal(merge_case(case, size=10**6, run_size=size), whole), case.name
            error = (merge_case(case, size=size) - whole).norm()
            assert float(error) <= 1e-6 * float(whole.norm()), case.name


@pytest.mark.parametrize(
    "name", [name for name in methods.names() if methods.method(name).INPUTS[0] == 0]
)
def test_without_an_input_it_is_the_base(name: str) -> None:
    base = torch.randn(4, 8)
    assert torch.equal(merge(name, base, []), base)


def test_multislerp_without_a_direction_says_so() -> None:
    base = torch.zeros(4, 8)
    x = torch.ones(4, 8)
    with pytest.raises(NumericsError, match="cancel"):
        merge("multislerp", base, [x, -x, 0 * x], each={"weight": [1.0, 1.0, 1.0]})


@pytest.mark.parametrize(
    ("density", "epsilon", "wrong"), [(0.9, 0.15, 1), (0.1, 0.1, 1), (1, 3, 0)]
)
def test_della_refuses_probabilities_that_are_none(
    density: float, epsilon: float, wrong: bool
) -> None:
    each = {"weight": [1.0], "density": [density], "epsilon": [epsilon]}
    said = methods.check(methods.method("della"), task_of("della", (4, 8), 1, {}, each))
    assert (said is not None) == wrong
    assert not wrong or f"{density:g}" in str(said)


def test_experts_in_a_stack_are_merged_as_they_would_be_alone() -> None:
    """Where MergeKit goes across the stack: the methods that look along rows or columns."""
    draw = torch.Generator().manual_seed(0)
    base, *inputs = (torch.randn(3, 6, 8, generator=draw) for _ in range(3))
    params = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    each = {"weight": [0.3, 0.9]}
    together = merge("nuslerp", base, inputs, params, each, size=56)
    for n in range(3):
        alone = merge("nuslerp", base[n], [x[n] for x in inputs], params, each)
        assert torch.allclose(together[n], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "params"), [("karcher", {"tol": 0}), ("multislerp", {"eps": 0})]
)
def test_a_tolerance_of_nothing(method: str, params: dict[str, Any]) -> None:
    """Where MergeKit divides 0 by 0: equal models are their own mean, and so are zeros."""
    x = torch.randn(4, 8)
    each = {"weight": [0.5, 0.5]} if method == "multislerp" else {}
    base = torch.zeros(4, 8) if method == "multislerp" else None
    assert torch.allclose(merge(method, base, [x, x.clone()], params, each), x, rtol=1e-6)
    assert not merge(method, base, [0 * x, 0 * x], params, each).any()
