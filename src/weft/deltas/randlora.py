"""RandLoRA (arXiv:2502.00987): W′ = W + scaling · a sum of random products, each scaled by itself.

`A` (r, 1, s) and `B` (l, bases, r) are fixed and shared; a module takes the beginnings that its
shorter side s, its longer one l and its number of bases ask for. `lambda` (r, bases) and `gamma`
(bases, s) are trained, and make Â[i, n, j] = lambda[i, n] · A[i, 0, j] · gamma[n, j]. Both Â and B
are flattened to matrices as they lie, r × bases of one with bases × r of the other, and multiplied;
the product or its transpose has W's shape. Its rank is full: the factors take as much memory as W,
or twice.

`seed` in place of A and B: they were not saved, and are drawn again, as large as the largest module
asks for. `sparsity` 0: uniform, in bfloat16. Else one of −1, 0 and 1, all alike likely for 3, and 0
the likelier the larger it is; −1 stands for √s. Divided by their deviation, they are rounded to the
dtype of the base: the one that it has on disk counts.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from weft.core.dtypes import itemsize
from weft.core.lazy import torch
from weft.deltas._low_rank import Factors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape, TensorRef
    from weft.deltas import Blocks, Source

ADDITIVE = True
SILENT = ("lambda", "gamma")
TRANSPOSES = True


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    if len(weight) != 2 or min(weight) != shapes["gamma"][1]:
        return ()
    rank, bases = shapes["lambda"]
    if bases != -(-min(weight) // rank):
        return ()
    if "A" in shapes:
        A, B = shapes["A"], shapes["B"]
        if A[2] < min(weight) or B[0] < max(weight) or B[1] < bases:
            return ()
    return (False, True)


def across(changed: Sequence[tuple[Delta, TensorRef]]) -> dict[str, Param]:
    """The sides of the largest module, and the dtype that A and B are rounded to."""
    shapes = [
        ref.shape[::-1] if delta.param("transposed", False) else ref.shape for delta, ref in changed
    ]
    outputs, inputs = (max(sizes) for sizes in zip(*shapes, strict=True))
    dtype = min((ref.dtype for _, ref in changed), key=itemsize)
    return {"short": min(outputs, inputs), "long": max(outputs, inputs), "dtype": dtype}


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Factors:
    scale, gamma = source.whole("lambda"), source.whole("gamma")
    (rank, bases), short, long = scale.shape, gamma.shape[1], max(source.shape)
    if any(role == "A" for role, _ in delta.tensors):
        A, B = source.whole("A"), source.whole("B")
    else:
        names = ("seed", "sparsity", "short", "long", "dtype")
        params = {name: delta.param(name, 0) for name in names}
        A, B = (drawn.to(scale) for drawn in _draw(rank, **params))
    B = B[:long, :bases].flatten(1)  # (long, bases · r)
    A = (scale[:, :, None] * A[:, :, :short] * gamma).flatten(0, 1)  # (r · bases, short)
    outputs, inputs = source.shape[::-1] if delta.param("transposed", False) else source.shape
    left, right = (B, A) if inputs <= outputs else (A.T, B.T)
    if delta.param("transposed", False):
        left, right = right.T, left.T
    return Factors(left, right, delta.scaling)


def block(state: Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)


@lru_cache(maxsize=1)
def _draw(
    rank: int, seed: int, sparsity: float, short: int, long: int, dtype: str
) -> tuple[Tensor, Tensor]:
    """A (rank, 1, short) and B (long, bases, rank), by one generator on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    bases = -(-short // rank)
    if sparsity:
        chance = 1 / (2 * (math.sqrt(short) if sparsity < 0 else sparsity))
        drawn = [
            torch.rand(shape, generator=generator, device="cpu")
            for shape in ((rank, 1, short), (long, bases, rank))
        ]
        both = [(d > 1 - chance).float() - (d < chance).float() for d in drawn]
    else:
        both = [_uniform(generator, rank, short)]
        both.append(torch.cat([_uniform(generator, long, rank) for _ in range(bases)], 1))
    A, B = ((d / d.std()).to(getattr(torch, dtype)) for d in both)
    return A, B


def _uniform(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    values = torch.empty(rows, 1, columns, dtype=torch.bfloat16, device="cpu")
    bound = math.sqrt(3.0) * (math.sqrt(1 / 3) / math.sqrt(columns))
    return values.uniform_(-bound, bound, generator=generator)
