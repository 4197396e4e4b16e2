"""LoHa against PEFT, in float64 and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import LoHaConfig

from tests.oracle.methods import Case, refusal

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


def test_refuses(tmp_path: Path) -> None:
    config = LoHaConfig(r=4, target_modules=LAYERS)
    key = "base_model.model.square.hada_w1_a"
    message = refusal(config, tmp_path / "missing", lambda t: t.pop(key))
    assert "module 'square'" in message
    assert "lacks hada_w1_a" in message
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(36, 3)}))
    assert "module 'square'" in message
    assert "hada_w1_a [36, 3]" in message
    assert "alpha = None, and must be a number" in refusal(config, tmp_path / "alpha", alpha=None)
