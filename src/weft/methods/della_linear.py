"""DELLA (arXiv:2406.11617): drops at random, the smallest rather; then the weighted sum.

y = b + λ Σ wᵢ drop(dᵢ). drop keeps an element with a
probability between density − ε and density + ε that grows with the rank of its |d| in its row, and
then gives the task vector its L1 norm back.

A row is one along dimension 1, as in MergeKit: that of a matrix, but the column of each matrix in a
stack of experts. A vector is one row. Equal elements share their mean rank, and the only element of
a row is kept with probability `density`, where MergeKit fails.

Defaults: density 1, ε (`epsilon`) 0.15, normalize false, rescale true, λ 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import _arithmetic, _sparsify

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.errors import Problem
    from weft.core.specs import Shape
    from weft.methods import Block, Blocks, Task
    from weft.native import Flat, Proof

USE_WHEN = "As dare_linear, where large changes should be likelier to stay."
PARAMETERS = _arithmetic.parameters(normalize=False, rescale=True, epsilon=_sparsify.EPSILON)
BASE = "required"
INPUTS = (0, None)
TASK_VECTORS = True
ROWS = True


def together(shape: Shape) -> int:
    return _sparsify.ranked_together(shape)


def check(task: Task) -> Problem | None:
    return _sparsify.check_ranks(task)


def prepare(task: Task, blocks: Blocks) -> list[_arithmetic.Part]:
    return _arithmetic.rescaled(task, blocks, _sparsify.by_rank(task))


def block(task: Task, state: list[_arithmetic.Part], block: Block) -> Tensor:
    return _arithmetic.merge(task, state, block, consensus=False)


def compiled(task: Task, state: list[_arithmetic.Part], block: Block, out: Flat) -> Proof | None:
    return _arithmetic.compiled(task, state, block, out, consensus=False)
