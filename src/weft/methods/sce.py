"""SCE (arXiv:2408.07990): select where the models differ, calculate their shares, erase a minority.

Of dᵢ = xᵢ − b, the elements with the largest variance over the models are selected:
int(`select_topk` · how many variances are not 0), for all models alike, and the others set to 0; of
equal variances the first. Model i weighs wᵢ = mean(dᵢ²) / Σⱼ mean(dⱼ²), all the same where that sum
is below 1e-6. Then

    y = b + Σ wᵢ dᵢ [sign dᵢ = s] / max(Σ wᵢ [sign dᵢ = s], 1e-6),

s the sign of Σ dᵢ, + if that is 0; a dᵢ of 0 never counts.

Defaults: select_topk 1 (no selection). The variance is taken in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.sums import dot
from weft.methods import Parameter, _select, _sparsify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weft.methods import Block, Blocks, Task
    from weft.methods._select import Cut

USE_WHEN = "Models that differ most where they know something: their shares are found, not given."
PARAMETERS = {
    "select_topk": Parameter(
        "share of the elements that is merged, all from 1 on", float, 1.0, low=0
    ),
    "int8_mask": Parameter("accepted; it never changed the values", bool, False),
}
BASE = "required"
INPUTS = (0, None)
TASK_VECTORS = True
ROWS = False

LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class State:
    """What the blocks are merged by.

    Attributes:
        cut: Of the variances; None where all elements are selected.
        weights: Of the inputs.
    """

    cut: Cut | None
    weights: list[float]


def prepare(task: Task, blocks: Blocks) -> State | None:
    if not task.count:
        return None
    cut = None
    if (share := float(task.params["select_topk"])) < 1:
        # Among zeros nothing is lost if none is selected.
        varied = sum(blocks.map(lambda block: int((_variance(block.inputs) > 0).sum())))
        rank = _select.Rank(0, int(varied * share))
        (cut,) = _select.cuts(task.numel, blocks, lambda block, _: _variance(block.inputs), [rank])

    def squares(block: Block) -> list[float]:
        _select_elements(cut, block)
        flat = [each.reshape(-1) for each in block.inputs]
        return [dot(each, each) for each in flat]

    sums = [sum(each) / max(task.numel, 1) for each in zip(*blocks.map(squares), strict=True)]
    total = sum(sums)
    even = [1 / task.count] * task.count
    return State(cut, [each / total for each in sums] if total >= LEAST else even)


def block(task: Task, state: State | None, block: Block) -> Tensor:
    import torch

    assert block.base is not None
    if state is None:
        return block.base
    _select_elements(state.cut, block)
    sign = block.inputs[0].clone()
    for each in block.inputs[1:]:
        sign.add_(each)
    sign.ge_(0).mul_(2).sub_(1)
    mixed, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, each in zip(state.weights, block.inputs, strict=True):
        each.mul_(sign).clamp_(min=0)
        mixed.add_(each, alpha=weight)
        share.add_(each.gt_(0), alpha=weight)
    return mixed.mul_(sign).div_(share.clamp_(min=LEAST)).add_(block.base)


def _select_elements(cut: Cut | None, block: Block) -> None:
    """Set to 0 what is not selected."""
    if cut is None:
        return
    selected = _variance(block.inputs).reshape(-1)
    _sparsify.Magnitudes(cut)(block.start, selected)
    selected.ne_(0)
    for each in block.inputs:
        each.reshape(-1).mul_(selected)


def _variance(inputs: Sequence[Tensor]) -> Tensor:
    """Population variance over the inputs, element by element."""
    import torch

    found = torch.empty_like(inputs[0])
    flat = [each.reshape(-1) for each in inputs]
    out = found.view(-1)
    for start in range(0, len(out), _sparsify.PIECE):
        parts = [each[start : start + _sparsify.PIECE].double() for each in flat]
        mean = torch.zeros_like(parts[0])
        for part in parts:
            mean.add_(part, alpha=1 / len(parts))
        total = torch.zeros_like(mean)
        for part in parts:
            total.add_((part - mean).square_(), alpha=1 / len(parts))
        out[start : start + _sparsify.PIECE] = total
    return found
