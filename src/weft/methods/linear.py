"""Linear, model soups (arXiv:2203.05482): y = Σ wᵢ xᵢ, divided by Σ wᵢ if `normalize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import Parameter, _arithmetic

if TYPE_CHECKING:
    from weft.core.errors import Problem
    from weft.methods import Task

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


def weights(task: Task, state: None) -> tuple[float, list[float]]:
    found = [float(weight) for weight in task.of_each("weight")]
    if task.params["normalize"]:
        found = [weight / sum(found) for weight in found]
    return 0.0, found
