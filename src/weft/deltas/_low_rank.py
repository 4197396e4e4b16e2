"""scaling · B @ A, in W's layout: what LoRA, DoRA and others share.

`A` (r, in) and `B` (out, r); `factors_transposed`: the file has them as (in, r) and (r, out).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Source


@dataclass(frozen=True, slots=True)
class Factors:
    """ΔW = scaling · left @ right, `left` (rows, r) and `right` (r, columns)."""

    left: Tensor
    right: Tensor
    scaling: float

    def product(self, start: int, out: Tensor) -> None:
        """Rows of ΔW into `out`.

        The product is rounded before it is scaled, as PEFT does it: then both are bit-equal. (The
        sum over the rank runs in the same order for any number of rows from 16 on.)
        """
        torch.mm(self.left[start : start + out.shape[0]], self.right, out=out)
        if self.scaling != 1:
            out.mul_(self.scaling)

    def add(self, weight: float, start: int, out: Tensor) -> None:
        """`out` += weight · ΔW for the rows from `start` on."""
        left = self.left[start : start + out.shape[0]]
        out.addmm_(left, self.right, alpha=self.scaling * weight)

    def square(self) -> float:
        """‖ΔW‖² = scaling² · tr(LᵀL · RRᵀ), in float64."""
        left, right = self.left.double(), self.right.double()
        return self.scaling**2 * float(((left.T @ left) * (right @ right.T)).sum())


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    """A (r, in…) and B (out, r, 1…) fit W (out, in…), and a matrix W (in, out) transposed.

    A square W fits both. A may have the axes of a kernel, or one for all of them.
    """
    A, B = factor_shapes(shapes, params)
    fitting = []
    if A[0] == B[1] and weight[:1] == B[:1] and A[1:] in (weight[1:], (math.prod(weight[1:]),)):
        fitting.append(False)
    if A[0] == B[1] and weight == (A[1], B[0]) and len(A) == 2:
        fitting.append(True)
    if "transposed" in params:
        return tuple(f for f in fitting if f is params["transposed"])
    return tuple(fitting)


def factor_shapes(shapes: Mapping[str, Shape], params: Mapping[str, Param]) -> tuple[Shape, Shape]:
    """Those of A (r, in…) and B (out, r, 1…)."""
    A, B = shapes["A"], shapes["B"]
    return (A[::-1], B[::-1]) if params.get("factors_transposed") else (A, B)


def in_halves(rows: Tensor, heads: Param) -> Tensor:
    """Rows of q or k in Hugging Face's order, if they come in that of Meta and torchtune.

    The two numbers that a rotary embedding turns together are neighbours there, and here d / 2
    apart: (heads, d / 2, 2) -> (heads, 2, d / 2). Without `heads` they lie right.
    """
    if not heads:
        return rows
    assert isinstance(heads, int)
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def load(delta: Delta, source: Source) -> Factors:
    A, B = source.whole("A").flatten(1), source.whole("B").flatten(1)
    if delta.param("factors_transposed", False):
        A, B = A.T.contiguous(), B.T.contiguous()  # so that the bits are those of PEFT's layout
    B = in_halves(B, delta.param("rotary_heads", 0))
    scaling = delta.scaling
    if scaling and abs(math.frexp(scaling)[0]) == 0.5:
        # A power of two scales exactly, wherever it is applied: here it costs a pass less.
        B, scaling = B * scaling, 1.0
    if delta.param("transposed", False):
        return Factors(A.T, B.T, scaling)
    return Factors(B, A, scaling)
