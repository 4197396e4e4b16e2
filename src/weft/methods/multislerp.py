"""Multi-SLERP (Charles O. Goddard, 2025): a weighted mean of directions, of the mean length.

With dᵢ = xᵢ − b (xᵢ without a base), uᵢ = dᵢ / (‖dᵢ‖ + eps) and m = Σ wᵢ uᵢ,

    y = b + Σ wᵢ ‖dᵢ‖ · cos(eps) · m / ‖m‖,

the weights divided by their sum if `normalize_weights`. That is the published method (to the
tangent space at m / ‖m‖, the weighted mean there, and back by the exponential map) without the
detour: the weighted mean of the tangent vectors Σ wᵢ (uᵢ − ⟨uᵢ, m⟩ m / ‖m‖²) is 0.

A single model comes out as it is. Where ‖m‖ < eps, two models are added by their weights; more are
an error. Defaults: normalize_weights true, eps 1e-8.

Source: https://goddard.blog/posts/multislerp-wow-what-a-cool-idea
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weft.core.errors import NumericsError
from weft.methods import Parameter, _arithmetic, _gram

if TYPE_CHECKING:
    from weft.core.errors import Problem
    from weft.methods import Blocks, Task

USE_WHEN = "More than two models as slerp would merge two: their mean direction, not shrunk."
PARAMETERS = {
    "weight": Parameter("share of the model", each=True),
    "normalize_weights": Parameter("divide the weights by their sum", bool, True),
    "eps": Parameter("a length below it is that of nothing", float, 1e-8, low=0),
}
BASE = "optional"
INPUTS = (1, None)
TASK_VECTORS = True
ROWS = False


def check(task: Task) -> Problem | None:
    """Weights that cannot be normalised."""
    weights = [float(weight) for weight in task.of_each("weight")]
    divided = task.count > 1 and task.params["normalize_weights"]
    return _arithmetic.check_sum(weights, "normalize_weights") if divided else None


def prepare(task: Task, blocks: Blocks) -> list[float]:
    """The coefficient of every dᵢ."""
    if task.count == 1:
        return [1.0]
    weights = [float(weight) for weight in task.of_each("weight")]
    if task.params["normalize_weights"]:
        weights = [weight / sum(weights) for weight in weights]
    eps = float(task.params["eps"])
    products = _gram.gram(blocks)
    norms = [math.sqrt(products[n, n]) for n in range(task.count)]
    mean = [w / (norm + eps or 1.0) for w, norm in zip(weights, norms, strict=True)]
    length = _gram.norm(products, mean)
    if length < eps or not length:
        if task.count == 2:
            return weights
        raise NumericsError(
            "multislerp has no mean direction: the weighted directions of the models cancel",
            "give the models other weights",
        )
    scale = sum(w * norm for w, norm in zip(weights, norms, strict=True)) * math.cos(eps) / length
    return [scale * each for each in mean]


def weights(task: Task, state: list[float]) -> tuple[float, list[float]]:
    return 1.0, state
