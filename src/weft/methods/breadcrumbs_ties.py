"""Model Breadcrumbs (arXiv:2312.06795) with the vote of TIES (arXiv:2306.01708).

y = b + λ Σ eᵢ [sign eᵢ = s], eᵢ = wᵢ crumbs(dᵢ), s = sign Σ eᵢ, as `weft.methods._arithmetic` says
in full. Of n elements, sorted by |d|, crumbs drops the int(gamma · n) largest and keeps the
int(density · n) before them; if fewer are left, it drops fewer. Of equal elements the first count
as the smaller, as in a stable sort; in MergeKit any do.

Defaults: density 1, gamma 0.01, normalize false, rescale false, λ 1. A density of 1 keeps all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.methods import _arithmetic, _sparsify

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods import Block, Blocks, Task
    from weft.native import Flat, Proof

USE_WHEN = "As breadcrumbs, where the fine-tunes pull in opposite directions."
PARAMETERS = _arithmetic.parameters(normalize=False, rescale=False, gamma=_sparsify.GAMMA)
BASE = "required"
INPUTS = (0, None)
TASK_VECTORS = True
ROWS = False


def prepare(task: Task, blocks: Blocks) -> list[_arithmetic.Part]:
    return _arithmetic.rescaled(task, blocks, _sparsify.without_outliers(task, blocks))


def block(task: Task, state: list[_arithmetic.Part], block: Block) -> Tensor:
    return _arithmetic.merge(task, state, block, consensus=True)


def compiled(task: Task, state: list[_arithmetic.Part], block: Block, out: Flat) -> Proof | None:
    return _arithmetic.compiled(task, state, block, out, consensus=True)
