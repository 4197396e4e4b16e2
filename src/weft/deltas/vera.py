"""VeRA (arXiv:2310.11454): W′ = W + (λ_b ⊙ B) @ (λ_d ⊙ A), with A and B that all modules share.

`lambda_b` (out,), `lambda_d` (r,); `A` (r, inputs), `B` (outputs, r), of which a smaller W takes
the first columns and rows. `halved`: PVeRA (arXiv:2512.07703), whose `lambda_d` and `A` have the
means in their first half and log-variances in the second; the mean is what is merged. `transposed`
as in LoRA.

`seed` in place of A and B: they were not saved, and are drawn again, as large as the largest module
asks for. PEFT rounds them to the dtype of the base: the one that the base has on disk counts.
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
SILENT = ("A", "B", "lambda_b", "lambda_d")
TRANSPOSES = True


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    if len(weight) != 2:
        return ()
    (outputs,) = shapes["lambda_b"]
    return tuple(
        turned
        for turned, (out, inner) in ((False, weight), (True, weight[::-1]))
        if out == outputs
        and ("A" not in shapes or (inner <= shapes["A"][1] and out <= shapes["B"][0]))
    )


def across(changed: Sequence[tuple[Delta, TensorRef]]) -> dict[str, Param]:
    """The size of A and B, and the dtype that they are rounded to."""
    outputs = [dict(delta.tensors)["lambda_b"].numel for delta, _ in changed]
    inputs = [ref.numel // out for (_, ref), out in zip(changed, outputs, strict=True)]
    dtype = min((ref.dtype for _, ref in changed), key=itemsize)
    return {"outputs": max(outputs), "inputs": max(inputs), "dtype": dtype}


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Factors:
    lambda_b, lambda_d = source.whole("lambda_b"), source.whole("lambda_d")
    turned = bool(delta.param("transposed", False))
    outputs, inputs = source.shape[::-1] if turned else source.shape
    rank = lambda_d.shape[0] // (2 if delta.param("halved", False) else 1)
    if any(role == "A" for role, _ in delta.tensors):
        A, B = source.whole("A"), source.whole("B")
    else:
        params = {name: delta.param(name, 0) for name in ("seed", "outputs", "inputs", "dtype")}
        A, B = (drawn.to(lambda_d) for drawn in _draw(lambda_d.shape[0], rank, **params))
    left = lambda_b[:, None] * B[:outputs]
    right = lambda_d[:rank, None] * A[:rank, :inputs]
    return Factors(right.T, left.T, 1.0) if turned else Factors(left, right, 1.0)


@lru_cache(maxsize=1)
def _draw(
    rows: int, rank: int, seed: int, outputs: int, inputs: int, dtype: str
) -> tuple[Tensor, Tensor]:
    """Kaiming-uniform A (rows, inputs) and B (outputs, rank), by one generator on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        return values.uniform_(-bound, bound, generator=generator).to(getattr(torch, dtype))

    return uniform(rows, inputs), uniform(outputs, rank)


def square(state: Factors) -> float:
    return state.square()


def block(state: Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)
