"""Arcee Fusion: of the other model only what is important.

The importance of an element is |x − b| · Kᵣ, Kᵣ = Σ p log(p / q) the Kullback-Leibler divergence of
its row, p = softmax(x) + 1e-8 and q = softmax(b) + 1e-8 along the last dimension. Then

    y = x where the importance is ≥ median + 1.5 (Q₃ − Q₁), else b,

median and quartiles of the whole tensor's importances, sorted, at int(k (n − 1) / 4). MergeKit
takes them of a random sample beyond a million elements; here they are exact. Kᵣ is taken in
float64: in float32 that of a small change is noise.

No parameters.

Source: MergeKit; there is no paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.methods import _select

if TYPE_CHECKING:
    from torch import Tensor

    from weft.methods import Block, Blocks, Parameter, Task

USE_WHEN = "A base should take from another model what that has changed most, and nothing else."
PARAMETERS: dict[str, Parameter] = {}
BASE = "required"
INPUTS = (1, 1)
TASK_VECTORS = True
ROWS = True

EPSILON = 1e-8
PIECE = 2**16  # elements whose softmax is taken at once


@dataclass(frozen=True, slots=True)
class State:
    """What the blocks are merged by.

    Attributes:
        divergence: Kᵣ of every row, in the blocks' dtype.
        threshold: Of the importance.
    """

    divergence: Tensor
    threshold: float


def prepare(task: Task, blocks: Blocks) -> State:
    import torch

    divergence = torch.cat(blocks.map(lambda block: _divergence(task, block)))

    def importance(block: Block, _: int) -> Tensor:
        return _importance(task, divergence, block)

    places = [k * (task.numel - 1) // 4 for k in (1, 2, 3)]
    ranks = [_select.Rank(0, place + 1, largest=False) for place in places]
    cuts = _select.cuts(task.numel, blocks, importance, ranks, ties=False)
    first, median, third = (cut.value for cut in cuts)
    return State(divergence, median + 1.5 * (third - first))


def block(task: Task, state: State, block: Block) -> Tensor:
    assert block.base is not None
    importance = _importance(task, state.divergence, block, block.inputs[0].abs())
    return block.inputs[0].mul_(importance.ge_(state.threshold)).add_(block.base)


def _importance(task: Task, divergence: Tensor, block: Block, size: Tensor | None = None) -> Tensor:
    """In the memory of the input, unless its magnitudes are given."""
    size = block.inputs[0].abs_() if size is None else size
    columns = task.shape[-1] if task.shape else 1
    rows = size.view(-1, columns)
    first = block.start // columns
    rows.mul_(divergence[first : first + len(rows), None])
    return size


def _divergence(task: Task, block: Block) -> Tensor:
    import torch

    assert block.base is not None
    columns = task.shape[-1] if task.shape else 1
    base, change = (each.reshape(-1, columns) for each in (block.base, block.inputs[0]))
    step = max(PIECE // max(columns, 1), 1)
    found = []
    for start in range(0, len(base), step):
        b, d = (each[start : start + step].double() for each in (base, change))
        p, q = (each.softmax(1).add_(EPSILON) for each in (d.add_(b), b))
        found.append((p * (p / q).log_()).sum(1))
    return torch.cat(found).to(base.dtype) if found else base.new_zeros(0)
