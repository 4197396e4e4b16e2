"""RAM+, tensor-local (arXiv:2601.13572): RAM, where what only one model changed is strengthened.

y = b + Σ λᵢ dᵢ [|dᵢ| > ε, no other is] + Σ dᵢ [|dᵢ| > ε, others are] / c, c how many models have
|dᵢ| > ε there. With uᵢ elements that only model i has changed, and sᵢ that others have, too,

    λᵢ = 1 + r · min(sᵢ / max(uᵢ, ε), alpha).

Defaults: r 0.1, alpha 0.2, ε (`epsilon`) 1e-5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods import Block, Blocks, Task

USE_WHEN = "As ram, where the mean of what is shared would leave each model too weak."
PARAMETERS = {
    "r": Parameter("how much a model's own changes are strengthened", float, 0.1),
    "alpha": Parameter("the largest ratio of shared to own changes that counts", float, 0.2, low=0),
    "epsilon": Parameter("a change of no more is none", float, 1e-5, low=0),
}
BASE = "required"
INPUTS = (0, None)
TASK_VECTORS = True
ROWS = False


def prepare(task: Task, blocks: Blocks) -> list[float]:
    """λ of every input."""

    def counts(block: Block) -> list[tuple[int, int]]:
        changed, total = _changed(task, block)
        alone = total == 1
        own = [int((each.bool() & alone).sum()) for each in changed]
        return [(n, int(each.sum()) - n) for n, each in zip(own, changed, strict=True)]

    found = blocks.map(counts) if task.count else []
    r, alpha = float(task.params["r"]), float(task.params["alpha"])
    factors = []
    for number in range(task.count):
        own = sum(each[number][0] for each in found)
        shared = sum(each[number][1] for each in found)
        ratio = shared / max(own, float(task.params["epsilon"]))
        factors.append(1 + r * max(0.0, min(ratio, alpha)))
    return factors


def block(task: Task, state: list[float], block: Block) -> Tensor:
    assert block.base is not None
    if not block.inputs:
        return block.base
    _, total = _changed(task, block)
    alone = (total == 1).to(total.dtype)
    total.clamp_(min=1).reciprocal_()
    for factor, each in zip(state, block.inputs, strict=True):
        each.mul_(alone.mul(factor - 1).add_(total))
    for each in block.inputs[1:]:
        block.inputs[0].add_(each)
    return block.inputs[0].add_(block.base)


def _changed(task: Task, block: Block) -> tuple[list[Tensor], Tensor]:
    """1 where an input changes an element, and their sum; other changes are set to 0."""
    import torch

    changed = []
    for each in block.inputs:
        torch.hardshrink(each, task.params["epsilon"], out=each)
        changed.append(torch.ne(each, 0, out=torch.empty_like(each)))
    total = changed[0].clone()
    for one in changed[1:]:
        total.add_(one)
    return changed, total
