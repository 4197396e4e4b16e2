"""GraLoRA against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import GraloraConfig

from tests.oracle.methods import Case, Turned, refusal

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

LAYERS = ["linear", "square", "wide"]
OPTIONS = pytest.mark.parametrize(
    "options",
    [{"r": 4}, {"r": 12, "gralora_k": 4, "alpha": 9}, {"r": 4, "hybrid_r": 3, "alpha": 5}],
    ids=["plain", "four", "hybrid"],
)


@OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, int]) -> None:
    case = Case(GraloraConfig(target_modules=LAYERS, **options), dtype)
    case.run(tmp_path)
    if (
        options.get("gralora_k") != 4
    ):  # PEFT sums r values of which most are zeros, in its own order
        case.check_bits(tmp_path)


@OPTIONS
def test_merges_conv1d(tmp_path: Path, options: dict[str, int]) -> None:
    case = Case(GraloraConfig(target_modules=["c_fc", "c_proj"], **options), model=Turned)
    case.run(tmp_path)


def test_refuses(tmp_path: Path) -> None:
    config = GraloraConfig(r=4, hybrid_r=3, target_modules=LAYERS)
    key = "base_model.model.square.gralora_B"
    assert "lacks gralora_B" in refusal(config, tmp_path / "missing", lambda t: t.pop(key))
    message = refusal(config, tmp_path / "rank", lambda t: t.update({key: torch.ones(2, 5, 18)}))
    assert "gralora_B [2, 5, 18]" in message
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(2, 4, 17)}))
    assert "square.weight is [36, 36]" in message
    assert "square.gralora_B [2, 4, 17]" in message
    assert "have gralora_k = 2, and it is 4" in refusal(config, tmp_path / "k", gralora_k=4)
    message = refusal(config, tmp_path / "hybrid", hybrid_r=0)
    assert "gralora_A_general.weight" in message
