"""Task arithmetic (arXiv:2212.04089): y = b + λ Σ wᵢ (xᵢ − b), divided by Σ wᵢ if `normalize`.

Defaults: normalize false, λ 1. `density` and `rescale` are accepted; nothing is dropped here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import _arithmetic

if TYPE_CHECKING:
    from weft.methods import Task

USE_WHEN = "What several models have learned on top of one base is to be added up, or taken away."
PARAMETERS = _arithmetic.parameters(normalize=False, rescale=False)
BASE = "required"
INPUTS = (0, None)
TASK_VECTORS = True
ROWS = False


def weights(task: Task, state: None) -> tuple[float, list[float]]:
    return 1.0, _arithmetic.factors(task, task.of_each("weight"))
