"""LoHa against PEFT, in float64 and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import LoHaConfig

from tests.oracle.methods import Case

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "conv1", "conv2", "point"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_effective_conv2d": True},
        {"rank_pattern": {"square": 3}, "alpha_pattern": {"linear": 5}},
    ],
    ids=["plain", "effective-conv", "patterns"],
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, object]) -> None:
    config = LoHaConfig(r=4, alpha=6, target_modules=LAYERS, **options)  # type: ignore[arg-type]
    Case(config, dtype).run(tmp_path)
