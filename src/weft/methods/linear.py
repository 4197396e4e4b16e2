"""Linear, model soups (arXiv:2203.05482): y = Σ wᵢ xᵢ, divided by Σ wᵢ if `normalize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import Parameter

if TYPE_CHECKING:
    from torch import Tensor

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


def check(task: Task) -> str | None:
    """Weights that cannot be normalised."""
    weights = task.of_each("weight")
    least = 1e-8 * sum(
        abs(weight) for weight in weights
    )  # what is left of 0.1 + 0.2 − 0.3 is noise
    if task.params["normalize"] and abs(sum(weights)) <= least:
        return f"the weights {', '.join(map(str, weights))} add up to 0, by which normalize divides"
    return None


def block(task: Task, state: None, block: Block) -> Tensor:
    weights = task.of_each("weight")
    if task.params["normalize"]:
        weights = [weight / sum(weights) for weight in weights]
    mixed = block.inputs[0].mul_(weights[0])
    for each, weight in zip(block.inputs[1:], weights[1:], strict=True):
        mixed.add_(each, alpha=weight)
    return mixed
