"""Linear, model soups (arXiv:2203.05482): y = Σ wᵢ xᵢ, divided by Σ wᵢ if `normalize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import Parameter, _arithmetic

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.errors import Problem
    from weft.methods import Block, Task

USE_WHEN = "Models tuned from one base, averaged: the plain choice, and a strong one."
PARAMETERS = {
    "weight": Parameter("share of the model", each=True, base_too=True),
    "normalize": Parameter("divide by the sum of the weights", bool, True),
}
BASE = "none"
INPUTS = (1, None)
TASK_VECTORS = False
ROWS = False


def check(task: Task) -> Problem | None:
    """Weights that cannot be normalised."""
    weights = task.of_each("weight")
    return _arithmetic.check_sum(weights, "normalize") if task.params["normalize"] else None


def block(task: Task, state: None, block: Block) -> Tensor:
    weights = task.of_each("weight")
    if task.params["normalize"]:
        weights = [weight / sum(weights) for weight in weights]
    mixed = block.inputs[0].mul_(weights[0])
    for each, weight in zip(block.inputs[1:], weights[1:], strict=True):
        mixed.add_(each, alpha=weight)
    return mixed
