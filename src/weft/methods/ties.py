"""TIES (arXiv:2306.01708): of every task vector the largest elements; then a vote on the sign.

y = b + λ Σ eᵢ [sign eᵢ = s] / Σ wᵢ [sign eᵢ = s], eᵢ = wᵢ top(dᵢ), s = sign Σ eᵢ, as
`weft.methods._arithmetic` says in full. top keeps the int(density · n) elements of largest |d|, at
least one (none for a density of 0); of equal ones the first, where MergeKit takes any.

Defaults: density 1, normalize true, rescale false, λ 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import _arithmetic, _sparsify

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods import Block, Blocks, Task
    from weft.native import Flat, Proof

USE_WHEN = "Several models tuned from one base for different tasks, whose changes conflict."
PARAMETERS = _arithmetic.parameters(normalize=True, rescale=False)
BASE = "required"
INPUTS = (0, None)
TASK_VECTORS = True
ROWS = False


def prepare(task: Task, blocks: Blocks) -> list[_arithmetic.Part]:
    return _arithmetic.rescaled(task, blocks, _sparsify.largest(task, blocks))


def block(task: Task, state: list[_arithmetic.Part], block: Block) -> Tensor:
    return _arithmetic.merge(task, state, block, consensus=True)


def compiled(task: Task, state: list[_arithmetic.Part], block: Block, out: Flat) -> Proof | None:
    return _arithmetic.compiled(task, state, block, out, consensus=True)
