"""Trained rows of an embedding (`trainable_token_indices`): W′[indices] = rows, the rest is W.

PEFT calls the tensor a delta; it holds the new rows themselves, (len(indices), hidden).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = False


@dataclass(frozen=True, slots=True)
class State:
    """New rows (n, hidden), and where they go (n)."""

    rows: Tensor
    indices: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    indices = params["indices"]
    assert isinstance(indices, tuple)
    fits = len(weight) == 2 and shapes["rows"][1] == weight[1]
    return (False,) if fits and max(indices, default=0) < weight[0] else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    rows = source.whole("rows")
    return State(rows, torch.tensor(delta.param("indices", ()), device=rows.device))


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    out.copy_(weight)
    here = (state.indices >= start) & (state.indices < start + out.shape[0])
    out[state.indices[here] - start] = state.rows[here]
