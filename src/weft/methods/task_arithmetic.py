"""Task arithmetic (arXiv:2212.04089): y = b + λ Σ wᵢ (xᵢ − b), divided by Σ wᵢ if `normalize`.

Defaults: normalize false, λ 1. `density` and `rescale` are accepted; nothing is dropped here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import _arithmetic, _sparsify

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods import Block, Task

USE_WHEN = "What several models have learned on top of one base is to be added up, or taken away."
PARAMETERS = _arithmetic.parameters(normalize=False, rescale=False)
BASE = "required"
INPUTS = (0, None)
TASK_VECTORS = True
ROWS = False


def block(task: Task, state: None, block: Block) -> Tensor:
    parts = [_arithmetic.Part(_sparsify.everything)] * task.count
    return _arithmetic.merge(task, parts, block, consensus=False)
