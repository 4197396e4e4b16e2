"""Slerp (Shoemake, 1985): along the great circle from the base b to the other model x.

y = sin((1 − t) θ) / sin θ · b + sin(t θ) / sin θ · x, θ the angle between the whole tensors b
and x, neither of them scaled. Nearly parallel or opposite (|cos θ| > 0.9995) it is
(1 − t) b + t x, which is what happens to most tensors of two models tuned from one.

t has no default; 0 is the base, 1 the other model.

Source: https://doi.org/10.1145/325334.325242
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weft.methods import Parameter, _gram

if TYPE_CHECKING:
    from weft.methods import Blocks, Task

USE_WHEN = "Two models, one on the way to the other; t may differ from layer to layer."
PARAMETERS = {"t": Parameter("how far from the base (0) to the other model (1)")}
BASE = "required"
INPUTS = (1, 1)
TASK_VECTORS = False
ROWS = False

PARALLEL = 0.9995
LEAST = 1e-8  # a norm below it is taken as 1


def prepare(task: Task, blocks: Blocks) -> tuple[float, float]:
    products = _gram.gram(blocks, base=True)
    norms = [math.sqrt(products[n, n]) for n in (0, 1)]
    ours, theirs = (norm if norm > LEAST else 1.0 for norm in norms)
    cosine = min(max(float(products[0, 1]) / ours / theirs, -1.0), 1.0)
    t = float(task.params["t"])
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def weights(task: Task, state: tuple[float, float]) -> tuple[float, list[float]]:
    return state[0], [state[1]]
