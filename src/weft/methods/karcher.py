"""Karcher mean (arXiv:2603.04972): the point of a sphere nearest to all models.

With αᵢ = 1/N and uᵢ = xᵢ / ‖xᵢ‖ as points of the unit sphere, from u = Σ αᵢ uᵢ, normalised,

    τ = Σ αᵢ θᵢ / sin θᵢ (uᵢ − cos θᵢ u), cos θᵢ = ⟨u, uᵢ⟩;    u ← cos ‖τ‖ u + sin ‖τ‖ τ / ‖τ‖

until ‖τ‖ < tol, max_iter times at most; y = Σ αᵢ ‖xᵢ‖ · u. A model with ‖xᵢ‖ ≤ tol has no
direction, and those with θᵢ < tol are taken to be at u. Every u is a weighted sum of the models, so
that the iteration is one of weights, by the inner products of the models.

Defaults: max_iter 10, tol 1e-5. A base counts as a model like the others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weft.methods import Parameter, _gram

if TYPE_CHECKING:
    from weft.methods import Blocks, Task

USE_WHEN = "Any number of models, equally: the mean that keeps their length."
PARAMETERS = {
    "max_iter": Parameter("iterations at most", int, 10, low=0),
    "tol": Parameter("the step, in radians, at which it ends", float, 1e-5, low=0),
}
BASE = "none"
INPUTS = (1, None)
TASK_VECTORS = False
ROWS = False


def prepare(task: Task, blocks: Blocks) -> list[float]:
    """The coefficient of every model."""
    if task.count == 1:
        return [1.0]
    import numpy as np

    products = _gram.gram(blocks)
    if not np.isfinite(products).all():
        return [math.nan] * task.count  # the output shows it, and it is looked for there
    norms = np.sqrt(np.diag(products))
    tol = float(task.params["tol"])
    seen = np.flatnonzero(norms > tol)
    weights = np.zeros(task.count)
    if not len(seen):
        return weights.tolist()
    cosines = products[np.ix_(seen, seen)] / np.outer(norms[seen], norms[seen])
    scale = norms.sum() / task.count
    weights[seen] = scale * _mean(cosines, int(task.params["max_iter"]), tol) / norms[seen]
    return weights.tolist()


def _mean(cosines: _gram.Matrix, iterations: int, tol: float) -> _gram.Matrix:
    """The mean's coefficients in the unit vectors that have these inner products."""
    import numpy as np

    count = len(cosines)
    mean = np.full(count, 1 / count)
    length = _gram.norm(cosines, mean)
    mean = mean / length if length >= tol else np.eye(count)[0]
    for _ in range(iterations):
        inner = np.clip(cosines @ mean, -1, 1)
        theta = np.arccos(inner)
        away = (theta >= tol) & (theta > 0)
        pull = np.zeros(count)
        pull[away] = theta[away] / np.sin(theta[away]) / count
        step = pull - (pull @ inner) * mean
        angle = _gram.norm(cosines, step)
        if angle < tol or not angle:
            break
        mean = math.cos(angle) * mean + math.sin(angle) / angle * step
        length = _gram.norm(cosines, mean)
        if length > tol:
            mean = mean / length
    return mean


def weights(task: Task, state: list[float]) -> tuple[float, list[float]]:
    return 0.0, state
