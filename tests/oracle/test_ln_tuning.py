"""LN tuning against PEFT: the layer that was trained is the one that is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import LNTuningConfig
from torch import nn

from tests.oracle.methods import Case, Toy, noise, refusal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


class Statistics(Toy):
    """With a norm that keeps statistics and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(10)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.batch_norm(super().forward(tokens))
        return out


def train(model: nn.Module) -> None:
    noise(model)
    for name, value in model.named_buffers():
        if "ln_tuning" in name:
            value.add_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layers", "model"),
    [(["norm"], Toy), (["norm", "conv2"], Toy), (["norm", "batch_norm"], Statistics)],
    ids=["norm", "any-layer", "statistics"],
)
def test_merges(tmp_path: Path, dtype: torch.dtype, layers: list[str], model: type[Toy]) -> None:
    case = Case(LNTuningConfig(target_modules=layers), dtype, train, model=model)
    case.run(tmp_path)
    case.check_bits(tmp_path)


def test_refuses(tmp_path: Path) -> None:
    config = LNTuningConfig(target_modules=["norm"])
    key = "base_model.model.norm.ln_tuning_layers.weight"
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(35)}))
    assert "norm.weight is [36]" in message
    assert f"{key} [35]" in message
    other = "base_model.model.norm.ln_tuning_layers.scale"
    assert other in refusal(config, tmp_path / "more", lambda t: t.update({other: torch.ones(1)}))
