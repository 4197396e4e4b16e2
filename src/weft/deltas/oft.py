"""OFT (arXiv:2306.07280): W′ = W @ Rᵀ, R being orthogonal and block-diagonal over the inputs.

`R` (blocks, size · (size − 1) / 2) holds the upper triangle of a skew-symmetric Q for each block;
one row serves all blocks if they share it (`shared`). A block of R is Q's Cayley transform, or with
`terms` > 0 the beginning of the Neumann series of (I + Q)(I − Q)⁻¹ = I + 2Q + 2Q² + …
(arXiv:2506.19847); `halved`: the last power counts once, as it does from PEFT 0.18 on. With
`eps` > 0 (COFT) a Q of norm above eps / √rows is scaled down to that. Of an Embedding (`embedding`)
the output is rotated: W′ = W @ R.

W is (out, in), or a convolution of kernel 1: for larger kernels PEFT trains something else, namely
rotates the input's patches and adds up where they overlap, which no weight of this size does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod
from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.deltas import _rotation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = False
SILENT = ("R",)


@dataclass(frozen=True, slots=True)
class State:
    """What each block of a row is multiplied with, (blocks, size, size)."""

    rotation: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    blocks, size = shapes["R"][0], _size(shapes["R"][1])
    columns = prod(weight[1:])
    if len(weight) < 2 or size * (size - 1) // 2 != shapes["R"][1] or columns % size:
        return ()
    return (False,) if blocks == (1 if params["shared"] else columns // size) else ()


def refusal(shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape) -> str | None:
    if prod(weight[2:]) == 1:
        return None
    kernel = " × ".join(map(str, weight[2:]))
    return (
        f"in training PEFT adds up the overlapping patches of a convolution with kernel {kernel}, "
        "which multiplies its input; no merged weight does that, and PEFT's does not either"
    )


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    upper = source.whole("R")
    if limit := float(delta.param("eps", 0.0)) / len(upper) ** 0.5:  # type: ignore[arg-type]
        norm = torch.linalg.vector_norm(upper, dim=1, keepdim=True) * 2**0.5
        upper = torch.where(norm > limit, upper * (limit / norm), upper)
    Q = _skew(upper)
    if terms := int(delta.param("terms", 0)):  # type: ignore[arg-type]
        R = _series(Q, _coefficients(terms, halved=bool(delta.param("halved", True))))
    else:
        R = _rotation.cayley(Q)
    if delta.param("shared", False):
        R = R.expand(prod(source.shape[1:]) // R.shape[1], -1, -1)
    return State(R.mT if delta.param("embedding", False) else R)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    _rotation.rotate(weight, state.rotation, out)


def _size(count: int) -> int:
    """Of a matrix whose upper triangle, without the diagonal, has `count` elements."""
    return (1 + isqrt(1 + 8 * count)) // 2


def _skew(upper: Tensor) -> Tensor:
    size = _size(upper.shape[1])
    Q = upper.new_zeros(len(upper), size, size)
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    Q[:, rows, columns] = upper
    return Q - Q.mT


def _coefficients(terms: int, *, halved: bool) -> list[float]:
    """Of Q, Q², …; with a halved end there is a third power from three terms on."""
    if not halved or terms < 3:
        return [2.0] * (terms - 1)
    return [2.0] * (max(terms, 4) - 2) + [1.0]


def _series(Q: Tensor, coefficients: list[float]) -> Tensor:
    """I + c₁Q + c₂Q² + …, by growing powers."""
    R = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).repeat(len(Q), 1, 1)
    power = None
    for coefficient in coefficients:
        power = Q if power is None else torch.bmm(power, Q)
        R.add_(power, alpha=coefficient)
    return R
