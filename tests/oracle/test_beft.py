"""BEFT against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import BeftConfig

from tests.oracle.methods import Case, refusal

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges(tmp_path: Path, dtype: torch.dtype) -> None:
    case = Case(BeftConfig(target_modules=["linear", "wide"]), dtype)
    case.run(tmp_path)
    case.check_bits(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias:UserWarning")
def test_refuses(tmp_path: Path) -> None:
    key = "base_model.model.linear.beft_bias"
    config = BeftConfig(target_modules=["linear", "wide"])
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(1, 35)}))
    assert "linear.bias is [36]" in message
    assert f"{key} [1, 35]" in message
    message = refusal(config, tmp_path / "flat", lambda t: t.update({key: torch.ones(36)}))
    assert "beft_bias [36]" in message
    message = refusal(BeftConfig(target_modules=["square"]), tmp_path / "none")
    assert "is a bias for square, which has none" in message
