"""LoKr (arXiv:2309.14859): W′ = W + scaling · w1 ⊗ w2, the Kronecker product.

`w1` (a, b) and `w2` (c, d, kernel…) make W (a · c, b · d, kernel…). Either may be a product
instead: `w1_a` (a, r) @ `w1_b` (r, b), `w2_a` (c, r) @ `w2_b` (r, d · kernel), or, of an effective
convolution, Σ t2[p, q, k…] · w2_a[p, c] · w2_b[q, d].

A row of ΔW is a row of `w1` times a row of `w2`: row o takes the rows o // c and o % c. A Conv1d
with a full `w2` is an exception: PEFT trains it with the axes of the two interleaved the other way,
so that row o takes the rows o % a and o // a, and `d` is the outer one of its columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


@dataclass(frozen=True, slots=True)
class State:
    """`left` (a, b) and `right` (c, d, kernel), the kernel flattened."""

    left: Tensor
    right: Tensor
    scaling: float
    swapped: bool


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    if len(weight) < 2:
        return ()
    rows, columns = _size(shapes, "w1")
    if "t2" in shapes:
        c, d = shapes["w2_a"][1], shapes["w2_b"][1]
        kernel = prod(shapes["t2"][2:])  # with an axis of 1 behind that of a Conv1d
        fits = weight[:2] == (rows * c, columns * d) and prod(weight[2:]) == kernel
    elif "w2" in shapes:
        c, d, *kernel_axes = shapes["w2"]
        fits = weight == (rows * c, columns * d, *kernel_axes)
    else:
        c, flat = shapes["w2_a"][0], shapes["w2_b"][1]
        fits = (weight[0], prod(weight[1:])) == (rows * c, columns * flat)
    return (False,) if fits else ()


def _size(shapes: Mapping[str, Shape], role: str) -> tuple[int, int]:
    full = shapes.get(role)
    return (full[0], full[1]) if full else (shapes[f"{role}_a"][0], shapes[f"{role}_b"][1])


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    shapes = {role: ref.shape for role, ref in delta.tensors}
    left = _product(source, "w1", shapes)
    if "t2" in shapes:
        core, a, b = (source.whole(role) for role in ("t2", "w2_a", "w2_b"))
        right = torch.einsum("pq...,pc,qd->cd...", core, a, b)
    else:
        right = _product(source, "w2", shapes)
    d = source.shape[1] // left.shape[1]
    swapped = len(source.shape) == 3 and "w2" in shapes
    return State(left, right.reshape(right.shape[0], d, -1), delta.scaling, swapped)


def _product(source: Source, role: str, shapes: Mapping[str, Shape]) -> Tensor:
    if role in shapes:
        return source.whole(role)
    return source.whole(f"{role}_a") @ source.whole(f"{role}_b")


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    (a, b), (c, d, kernel) = state.left.shape, state.right.shape
    row = torch.arange(start, start + out.shape[0], device=out.device)
    if state.swapped:
        left, right = state.left[row % a], state.right[row // a]
        parts = left[:, None, :, None], right[:, :, None, :]
        shape = (-1, d, b, kernel)
    else:
        left, right = state.left[row // c], state.right[row % c]
        parts = left[:, :, None, None], right[:, None, :, :]
        shape = (-1, b, d, kernel)
    torch.mul(*parts, out=out.view(shape)).mul_(state.scaling)
