"""Elements that PEFT drew by lot and did not save: what FourierFT and WaveFT share."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@lru_cache(maxsize=64)  # all modules of one shape have the same
def places(rows: int, columns: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Row and column, (count) each, of the elements that `seed` stands for."""
    generator = torch.Generator().manual_seed(seed)
    # The same lots in half the memory, which is that of a weight.
    dtype = torch.int32 if rows * columns < 2**31 else torch.int64
    drawn = torch.randperm(rows * columns, generator=generator, dtype=dtype)[:count].long()
    return drawn // columns, drawn % columns
