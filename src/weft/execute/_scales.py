"""The scales of float8 weights, block by block of the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.blocks import rows_and_columns
from weft.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import Scaled
    from weft.execute._expressions import Evaluator


def scales(expression: Scaled, evaluator: Evaluator) -> Tensor:
    """All of them: (⌈out / b₀⌉, ⌈in / b₁⌉), a few thousand numbers of a large matrix."""
    rows, columns = rows_and_columns(expression.scale.shape)
    workspace = evaluator.workspace
    out = torch.empty(rows, columns, dtype=evaluator.dtype, device=workspace.device)
    workspace.load(evaluator.files, expression.scale, 0, rows, out)
    return out


def spread(values: Tensor, block: tuple[int, int], start: int, stop: int, columns: int) -> Tensor:
    """The scale of every element of rows `start` to `stop`: (stop − start, columns or 1)."""
    if values.numel() == 1:
        return values.view(1, 1).expand(stop - start, 1)
    numbers = torch.arange(start, stop, device=values.device) // block[0]
    found = values[numbers]
    if found.shape[1] == 1:
        return found
    return found.repeat_interleave(block[1], dim=1)[:, :columns]
