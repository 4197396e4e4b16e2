"""Model Stock (arXiv:2403.19522): as far towards the mean as the fine-tunes agree.

With dᵢ = xᵢ − b of N ≥ 2 models and c the mean cosine of all pairs,

    t = N c / (1 + (N − 1) c),    y = b + t · mean(dᵢ).

c is that of the whole tensor, or by `filter_wise` of each row along the last dimension. Where the
denominator is 0 (below 1e-6) y is the base. The product of two norms counts as 1e-6 at least.

Defaults: filter_wise false.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

from weft.methods import Parameter, _gram

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods import Block, Blocks, Task

USE_WHEN = "A few fine-tunes of one base on the same task: better than their mean, without tuning."
PARAMETERS = {"filter_wise": Parameter("one angle for each row", bool, False)}
BASE = "required"
INPUTS = (2, None)
TASK_VECTORS = True
ROWS = True

LEAST = 1e-6


def prepare(task: Task, blocks: Blocks) -> float | None:
    """T / N, unless every row has its own."""
    if task.params["filter_wise"]:
        return None
    products = _gram.gram(blocks)
    cosines = []
    for i, j in combinations(range(task.count), 2):
        norms = max(math.sqrt(products[i, i] * products[j, j]), LEAST)
        cosines.append(min(max(float(products[i, j]) / norms, -1.0), 1.0))
    mean = sum(cosines) / len(cosines)
    denominator = 1 + (task.count - 1) * mean
    return mean / denominator if abs(denominator) >= LEAST else 0.0


def without_torch(task: Task) -> bool:
    return not task.params["filter_wise"]


def weights(task: Task, state: float | None) -> tuple[float, list[float]] | None:
    return None if state is None else (1.0, [state] * task.count)


def block(task: Task, state: None, block: Block) -> Tensor:
    """Where every row has an angle of its own."""
    import torch

    columns = task.shape[-1] if task.shape else 1
    rows = [each.reshape(-1, columns) for each in block.inputs]
    norms = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in rows]
    mean = torch.zeros_like(norms[0])
    for i, j in combinations(range(len(rows)), 2):
        # Rows may be nearly opposite, or as near as float32 tells: nothing is rounded before.
        products = (rows[i].double() * rows[j]).sum(1)
        mean += (products / (norms[i] * norms[j]).clamp_(min=LEAST)).clamp_(-1, 1)
    mean /= math.comb(len(rows), 2)
    denominator = 1 + (len(rows) - 1) * mean
    share = torch.where(denominator.abs() < LEAST, 0, mean / denominator)
    total = rows[0]
    for each in rows[1:]:
        total.add_(each)
    total.mul_(share.to(total.dtype)[:, None])
    assert block.base is not None
    return block.inputs[0].add_(block.base)
