"""RoAd against PEFT, in float64 and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import RoadConfig

from tests.oracle.methods import Case, refusal
from weft.core.blocks import BLOCK, STRIP

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]  # `square` has no bias
CONFIG = RoadConfig(group_size=6, target_modules=LAYERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize(("group", "layers"), [(2, LAYERS), (12, LAYERS), (36, ["square"])])
def test_merges(
    tmp_path: Path, dtype: torch.dtype, variant: str, group: int, layers: list[str]
) -> None:
    case = Case(RoadConfig(variant=variant, group_size=group, target_modules=layers), dtype)
    case.run(tmp_path)
    original = case._base().state_dict()
    assert torch.equal(case.merged["linear.bias"], original["linear.bias"]) == (group == 36)


def test_blocks_end_between_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    Case(RoadConfig(variant="road_4", group_size=12, target_modules=LAYERS)).run(tmp_path)


@pytest.mark.parametrize("name", ["road_theta", "road_alpha"])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(f"base_model.model.wide.{name}"))
    assert f"module 'wide' in {tmp_path}" in error
    assert f"and lacks {name}" in error


@pytest.mark.parametrize("names", [["road_theta"], ["road_theta", "road_alpha"]])
def test_wrong_shape(tmp_path: Path, names: list[str]) -> None:
    change = {f"base_model.model.wide.{name}": torch.ones(25) for name in names}
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert "wide" in error
    assert "road_theta [25]" in error
    assert "adapter_model.safetensors" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"variant": "road_3"},
            "variant = 'road_3', and must be one of 'road_1', 'road_2', 'road_4'",
        ),
        ({"group_size": 5}, "group_size = 5, and must be an even number above 0"),
        ({"group_size": 8}, "do not fit"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in refusal(CONFIG, tmp_path, **change)
