"""(IA)³ against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import IA3Config
from torch import nn

from tests.oracle.methods import Case, Toy, Turned, Volume, refusal

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

LAYERS = ["linear", "square", "wide", "conv2", "point"]


def grouped() -> nn.Module:
    """Its convolution in 4 groups of 3 inputs and 4 outputs."""
    toy = Toy()
    toy.conv2 = nn.Conv2d(12, 16, (3, 3), padding=1, groups=4)
    return toy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [Toy, grouped])
@pytest.mark.parametrize(
    "feedforward",
    [[], LAYERS, ["square", "conv2"], "sq.*|wide"],
    ids=["outputs", "inputs", "both", "expression"],
)
def test_merges(tmp_path: Path, dtype: torch.dtype, feedforward: Any, model: Any) -> None:
    targets = LAYERS if isinstance(feedforward, list) else "|".join(LAYERS)
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    case = Case(config, dtype, model=model)
    case.run(tmp_path)
    case.check_bits(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feedforward", [[], ["c_fc", "c_proj"]], ids=["outputs", "inputs"])
def test_merges_conv1d(tmp_path: Path, dtype: torch.dtype, feedforward: list[str]) -> None:
    config = IA3Config(target_modules=["c_fc", "c_proj"], feedforward_modules=feedforward)
    case = Case(config, dtype, model=Turned)
    case.run(tmp_path)
    case.check_bits(tmp_path)


@pytest.mark.parametrize("feedforward", [[], ["conv3"]], ids=["outputs", "inputs"])
def test_merges_conv3d(tmp_path: Path, feedforward: list[str]) -> None:
    config = IA3Config(target_modules=["conv3"], feedforward_modules=feedforward)
    case = Case(config, model=Volume)
    case.run(tmp_path)
    case.check_bits(tmp_path)


def test_refuses(tmp_path: Path) -> None:
    config = IA3Config(target_modules=LAYERS, feedforward_modules=["wide"])
    key = "base_model.model.linear.ia3_l"
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(35, 1)}))
    assert "linear.weight is [36, 24]" in message
    assert "linear.ia3_l [35, 1]" in message
    message = refusal(config, tmp_path / "turned", feedforward_modules=["linear"])
    assert "module 'linear'" in message
    assert "feedforward_modules names the module" in message
    message = refusal(config, tmp_path / "form", feedforward_modules="(")
    assert "a list of names or a regular expression" in message
    other = "base_model.model.linear.ia3_m"
    assert other in refusal(config, tmp_path / "more", lambda t: t.update({other: torch.ones(1)}))
