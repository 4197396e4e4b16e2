"""Passthrough: y = scale · x of the only model, or x itself without a `scale`.

Source: MergeKit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import Parameter

if TYPE_CHECKING:
    from weft.methods import Task

USE_WHEN = "Layers are to be stacked, left out or repeated, or single tensors scaled."
PARAMETERS = {
    "scale": Parameter("factor of the tensor", each=True, base_too=True, optional=True),
}
BASE = "none"
INPUTS = (1, 1)
TASK_VECTORS = False
ROWS = False


def weights(task: Task, state: None) -> tuple[float, list[float]]:
    (scale,) = task.of_each("scale")
    return 0.0, [1.0 if scale is None else float(scale)]
