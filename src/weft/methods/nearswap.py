"""NearSwap (by alchemonaut): towards the other model, by t at most in every element.

y = b + w (x − b), w = t / |x − b| within 0 and 1, where |x − b| counts as 1e-6 at least.

t has no default.

Source: https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods import Block, Task

USE_WHEN = "The base is to take over from another model only what is close to it already."
PARAMETERS = {"t": Parameter("how far an element may move, at most", low=0)}
BASE = "required"
INPUTS = (1, 1)
TASK_VECTORS = True
ROWS = False

LEAST = 1e-6


def block(task: Task, state: None, block: Block) -> Tensor:
    assert block.base is not None
    (change,) = block.inputs
    share = change.abs().clamp_(min=LEAST).reciprocal_().mul_(task.params["t"]).clamp_(0, 1)
    return change.mul_(share).add_(block.base)
