"""DARE (arXiv:2311.03099): of every task vector a random part, and their weighted sum.

y = b + λ Σ wᵢ drop(dᵢ). drop keeps each element with probability `density`, and then gives the task
vector its L1 norm back (the paper divides by the density, which is its expectation).

Defaults: density 1, normalize false, rescale true, λ 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import _arithmetic, _sparsify

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods import Block, Blocks, Task
    from weft.native import Flat, Proof

USE_WHEN = "Fine-tunes with much redundancy, thinned so that their sum disturbs each of them less."
PARAMETERS = _arithmetic.parameters(normalize=False, rescale=True)
BASE = "required"
INPUTS = (0, None)
TASK_VECTORS = True
ROWS = False


def prepare(task: Task, blocks: Blocks) -> list[_arithmetic.Part]:
    return _arithmetic.rescaled(task, blocks, _sparsify.at_random(task))


def without_torch(task: Task) -> bool:
    return _arithmetic.without_torch(task)


def block(task: Task, state: list[_arithmetic.Part], block: Block) -> Tensor:
    return _arithmetic.merge(task, state, block, consensus=False)


def compiled(task: Task, state: list[_arithmetic.Part], block: Block, out: Flat) -> Proof | None:
    return _arithmetic.compiled(task, state, block, out, consensus=False)
