"""Trainable tokens against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import TrainableTokensConfig

from tests.oracle.methods import Case, refusal

if TYPE_CHECKING:
    from pathlib import Path

config = TrainableTokensConfig(token_indices=[31, 2, 5], target_modules=["embed"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges(tmp_path: Path, dtype: torch.dtype) -> None:
    case = Case(config, dtype)
    case.run(tmp_path)
    case.check_bits(tmp_path)


def test_refuses(tmp_path: Path) -> None:
    key = "base_model.model.embed.trainable_tokens_delta"
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(3, 23)}))
    assert "embed.weight is [40, 24]" in message
    assert f"{key} [3, 23]" in message
    message = refusal(config, tmp_path / "few", lambda t: t.update({key: torch.ones(2, 24)}))
    assert "token_indices in adapter_config.json names 3 tokens" in message
    message = refusal(config, tmp_path / "which", token_indices=None)
    assert "token_indices in adapter_config.json does not say which" in message
    assert "embed.weight is [40, 24]" in refusal(config, tmp_path / "far", token_indices=[1, 2, 40])
