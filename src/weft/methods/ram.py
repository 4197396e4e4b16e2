"""RAM, Reinforced Agent Merging (arXiv:2601.13572): each element by those that changed it.

y = b + Σ dᵢ [|dᵢ| > ε] / max(c, 1), c the number of models with |dᵢ| > ε: what one model alone has
changed is taken in full, and what several have, by their mean.

Defaults: ε (`epsilon`) 1e-5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods import Block, Task

USE_WHEN = "Models tuned by reinforcement learning, each of which changed few elements."
PARAMETERS = {"epsilon": Parameter("a change of no more is none", float, 1e-5, low=0)}
BASE = "required"
INPUTS = (0, None)
TASK_VECTORS = True
ROWS = False


def block(task: Task, state: None, block: Block) -> Tensor:
    import torch

    assert block.base is not None
    if not block.inputs:
        return block.base
    count = torch.zeros_like(block.base)
    for each in block.inputs:
        # Zeroes what is not above epsilon, so that what is left is no zero.
        torch.hardshrink(each, task.params["epsilon"], out=each)
        count.add_(torch.ne(each, 0, out=torch.empty_like(each)))
    total = block.inputs[0]
    for each in block.inputs[1:]:
        total.add_(each)
    return total.div_(count.clamp_(min=1)).add_(block.base)
