"""DARE (arXiv:2311.03099) with the vote of TIES (arXiv:2306.01708).

y = b + λ Σ eᵢ [sign eᵢ = s], eᵢ = wᵢ drop(dᵢ), s = sign Σ eᵢ, as `weft.methods._arithmetic` says in
full. drop keeps each element with probability `density`, and then gives the task vector its L1
norm back (the paper divides by the density, which is its expectation).

Defaults: density 1, normalize false, rescale true, λ 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import _arithmetic, _sparsify

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods import Block, Blocks, Task
    from weft.native import Flat, Proof

USE_WHEN = "As ties, where the changes are many and small, and chance may choose among them."
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
    return _arithmetic.merge(task, state, block, consensus=True)


def compiled(task: Task, state: list[_arithmetic.Part], block: Block, out: Flat) -> Proof | None:
    return _arithmetic.compiled(task, state, block, out, consensus=True)
