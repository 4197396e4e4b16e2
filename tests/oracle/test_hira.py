"""HiRA against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import HiraConfig

from tests.oracle.methods import Case, Turned, Volume, refusal

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

LAYERS = ["embed", "linear", "square", "wide", "conv1", "conv2", "point"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"rank_pattern": {"square": 3}, "init_weights": "gaussian"}],
    ids=["plain", "pattern"],
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, object]) -> None:
    case = Case(HiraConfig(r=4, target_modules=LAYERS, **options), dtype)  # type: ignore[arg-type]
    case.run(tmp_path)


@pytest.mark.parametrize(
    ("layers", "model"),
    [(["embed", "linear", "square", "wide"], None), (["c_fc", "c_proj"], Turned)],
)
def test_has_the_bits_of_peft(tmp_path: Path, layers: list[str], model: object) -> None:
    """In float32; to bfloat16 PEFT rounds B @ A before it multiplies."""
    case = Case(HiraConfig(r=4, target_modules=layers), **({"model": model} if model else {}))
    case.run(tmp_path)
    case.check_bits(tmp_path)


def test_merges_conv3d(tmp_path: Path) -> None:
    Case(HiraConfig(r=4, target_modules=["conv3"]), model=Volume).run(tmp_path)


def test_refuses(tmp_path: Path) -> None:
    config = HiraConfig(r=4, target_modules=LAYERS)
    key = "base_model.model.square.hira_B"
    assert "lacks hira_B" in refusal(config, tmp_path / "missing", lambda t: t.pop(key))
    message = refusal(config, tmp_path / "rank", lambda t: t.update({key: torch.ones(36, 3)}))
    assert "hira_B [36, 3]" in message
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(35, 4)}))
    assert "square.weight is [36, 36]" in message
    assert "square.hira_B [35, 4]" in message
    assert "init_weights = 'svd'" in refusal(config, tmp_path / "init", init_weights="svd")
