"""NuSLERP (Charles O. Goddard, 2024): slerp between two models by weights, perhaps about a base.

With dᵢ = xᵢ − b (xᵢ without a base) and t = w₁ / (w₀ + w₁), or 1/2 where |w₀ + w₁| < 1e-6,

    y = b + sin((1 − t) θ) / sin θ · d₀ + sin(t θ) / sin θ · d₁,

θ the angle between d₀ and d₁; where they are parallel or opposite, b + (1 − t) d₀ + t d₁. A norm
counts as 1e-7 at least. By `nuslerp_flatten` θ is that of the whole tensors; without it each vector
along the last dimension has its own, or by `nuslerp_row_wise` each along the first.

In a stack of matrices (experts) `nuslerp_row_wise` takes each matrix for itself, along its first
dimension, as if it lay in the file alone; MergeKit goes across the stack. Exactly opposite vectors
are added by their weights, where MergeKit's float32 may divide by the sine of a rounding error.

Defaults: nuslerp_flatten true, nuslerp_row_wise false.

Source: MergeKit; there is no paper.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weft.methods import Parameter, _gram

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from weft.methods import Block, Blocks, Task

USE_WHEN = "As slerp, where neither model is the base, or only the changes should be turned."
PARAMETERS = {
    "weight": Parameter("share of the model", each=True),
    "nuslerp_flatten": Parameter("one angle for the whole tensor", bool, True),
    "nuslerp_row_wise": Parameter("else: vectors along the first dimension", bool, False),
}
BASE = "optional"
INPUTS = (2, 2)
TASK_VECTORS = True
ROWS = True

LEAST = 1e-7
PARALLEL = 1 - 2**-25  # rounds to a cosine of 1 in float32


def prepare(task: Task, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
    """The factors of d₀ and d₁: (1, 1), or (stack, columns); none for vectors in the blocks."""
    import torch

    if task.params["nuslerp_flatten"]:
        products = torch.from_numpy(_gram.gram(blocks))
        inner = products[0, 0], products[0, 1], products[1, 1]
        return _factors(task, *(each.reshape(1, 1) for each in inner))
    if not task.params["nuslerp_row_wise"]:
        return None
    stack, _, columns = _matrices(task)
    totals = torch.zeros(3, stack, columns, dtype=torch.float64)
    for found in blocks.map(lambda block: _columns(task, block)):
        for matrix, sums in found:
            totals[:, matrix] += sums
    return _factors(task, *totals)


def weights(task: Task, state: tuple[Tensor, Tensor] | None) -> tuple[float, list[float]] | None:
    if state is None or not task.params["nuslerp_flatten"]:
        return None
    return 1.0, [float(each) for each in state]


def block(task: Task, state: tuple[Tensor, Tensor] | None, block: Block) -> Tensor:
    """Where vectors have angles of their own."""
    total, other = block.inputs
    if state is None:
        _along_rows(task, total, other)
    else:
        ours, theirs = (each.to(total) for each in state)
        _, _, columns = _matrices(task)
        for matrix, first, part, more in _segments(task, block):
            before = first % columns
            count = -(-(before + len(part)) // columns)
            here = slice(before, before + len(part))
            part.mul_(ours[matrix].repeat(count)[here])
            part.add_(more.mul_(theirs[matrix].repeat(count)[here]))
    return total if block.base is None else total.add_(block.base)


def _factors(task: Task, ours: Tensor, both: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Of d₀ and d₁, by their inner products in float64."""
    import torch

    one, other = (float(weight) for weight in task.of_each("weight"))
    t = 0.5 if abs(one + other) < 1e-6 else other / (one + other)
    norms = ours.sqrt().clamp_(min=LEAST) * theirs.sqrt().clamp_(min=LEAST)
    cosine = (both / norms).clamp_(-1, 1)
    straight = cosine.abs() > PARALLEL
    theta = torch.acos(torch.where(straight, 0, cosine))
    sine = torch.sin(theta)
    return (
        torch.where(straight, 1 - t, torch.sin((1 - t) * theta) / sine),
        torch.where(straight, t, torch.sin(t * theta) / sine),
    )


def _along_rows(task: Task, total: Tensor, other: Tensor) -> None:
    import torch

    columns = task.shape[-1] if task.shape else 1
    rows, more = total.view(-1, columns), other.view(-1, columns)
    pairs = ((rows, rows), (rows, more), (more, more))
    inner = [torch.linalg.vecdot(a, b).double() for a, b in pairs]
    ours, theirs = (each.to(total.dtype)[:, None] for each in _factors(task, *inner))
    rows.mul_(ours).add_(more.mul_(theirs))


def _matrices(task: Task) -> tuple[int, int, int]:
    """The tensor as a stack of matrices whose columns are the vectors: how many, rows, columns."""
    shape = task.shape
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    rows = shape[0] if shape else 1
    return 1, rows, math.prod(shape[1:])


def _segments(task: Task, block: Block) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """What of the block is in one matrix: its number, the first element in it, and the inputs."""
    _, rows, columns = _matrices(task)
    size = max(rows * columns, 1)
    ours, theirs = (each.reshape(-1) for each in block.inputs)
    at = block.start
    while at < block.start + len(ours):
        stop = min(block.start + len(ours), (at // size + 1) * size)
        here = slice(at - block.start, stop - block.start)
        yield at // size, at % size, ours[here], theirs[here]
        at = stop


def _columns(task: Task, block: Block) -> list[tuple[int, Tensor]]:
    """Inner products (3, columns) of the columns' parts in the block, by matrix."""
    import torch

    _, _, columns = _matrices(task)
    found = []
    for matrix, first, ours, theirs in _segments(task, block):
        before = first % columns
        after = -(before + len(ours)) % columns
        sums = torch.empty(3, columns, dtype=torch.float64)
        for n, (one, other) in enumerate(((ours, ours), (ours, theirs), (theirs, theirs))):
            padded = torch.nn.functional.pad(one * other, (before, after))
            sums[n] = padded.view(-1, columns).sum(0, dtype=torch.float64)
        found.append((matrix, sums))
    return found
