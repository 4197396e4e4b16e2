"""DeLoRA against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import DeloraConfig

from tests.oracle.methods import Case, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"square": 3}, "lambda_pattern": {"linear": 5}},
        {"init_weights": False, "bias": "all"},
    ],
    ids=["plain", "patterns", "biases"],
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, object]) -> None:
    config = DeloraConfig(r=4, delora_lambda=3, target_modules=LAYERS, **options)  # type: ignore[arg-type]
    case = Case(config, dtype)
    case.run(tmp_path)
    if dtype == torch.float32:  # else PEFT rounds the delta before it adds it
        case.check_bits(tmp_path)


def test_the_norm_is_that_of_training(tmp_path: Path) -> None:
    """The file's, not that of the base that it is merged into."""

    def train(model: torch.nn.Module) -> None:
        for name, value in model.named_buffers():
            if "w_norm" in name:
                value.mul_(1.5)
        for name, value in model.named_parameters():
            if "delora_B" in name:
                value.data.normal_(std=0.1)

    Case(DeloraConfig(r=4, delora_lambda=3, target_modules=LAYERS), train=train).run(tmp_path)


def test_refuses(tmp_path: Path) -> None:
    config = DeloraConfig(r=4, target_modules=LAYERS)
    key = "base_model.model.square.delora_w_norm"
    assert "lacks delora_w_norm" in refusal(config, tmp_path / "missing", lambda t: t.pop(key))
    message = refusal(config, tmp_path / "norm", lambda t: t.update({key: torch.ones(35)}))
    assert "delora_w_norm [35]" in message
    assert "has rank 4, and" in refusal(config, tmp_path / "rank", r=5)
    key = "base_model.model.square.delora_B"
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(35, 4)}))
    assert "square.weight is [36, 36]" in message
    assert "square.delora_B [35, 4]" in message
