"""C3A against PEFT, in float64 and by the forward pass.

Not bit by bit: PEFT gets the kernel's values back from a Fourier transform in float32, whatever the
dtype of the base, and rounds them before it divides them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import C3AConfig

from tests.oracle.methods import Case, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 12}, {"block_size": 1, "bias": "c3a_only"}],
    ids=["plain", "large", "single-and-biases"],
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, object]) -> None:
    config = C3AConfig(**{"block_size": 4, "target_modules": LAYERS, **options})  # type: ignore[arg-type]
    Case(config, dtype).run(tmp_path)


def test_refuses(tmp_path: Path) -> None:
    config = C3AConfig(block_size=4, target_modules=LAYERS)
    key = "base_model.model.square.c3a_kernel"
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(9, 8, 4)}))
    assert "square.weight is [36, 36]" in message
    assert "square.c3a_kernel [9, 8, 4]" in message
    whole = torch.ones(9, 9, 4, dtype=torch.int64)
    message = refusal(config, tmp_path / "whole", lambda t: t.update({key: whole}))
    assert f"{key} in " in message
    assert "is int64, not a floating type" in message
    message = refusal(config, tmp_path / "flat", lambda t: t.update({key: torch.ones(324)}))
    assert "c3a_kernel [324]" in message
    other = "base_model.model.square.c3a_other"
    assert other in refusal(config, tmp_path / "more", lambda t: t.update({other: torch.ones(1)}))
