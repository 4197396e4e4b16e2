"""MiSS and Bone against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from peft import MissConfig
from safetensors.torch import load_file, save_file

import weft
from tests.oracle.methods import Case, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4},
        {"r": 5, "init_weights": False},  # does not divide the inputs
        {"r": 4, "init_weights": "bat"},
        {"r": 12, "init_weights": "bat"},
        {"r": 4, "init_weights": "mini", "mini_r": 6},
        {"r": 7, "init_weights": "mini", "mini_r": 3},
    ],
    ids=["plain", "uneven", "bat", "bat-12", "mini", "mini-uneven"],
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, object]) -> None:
    case = Case(MissConfig(target_modules=LAYERS, **options), dtype)  # type: ignore[arg-type]
    case.run(tmp_path)
    case.check_bits(tmp_path, sums=options.get("init_weights") == "bat")


@pytest.mark.parametrize("mode", [True, "bat"])
def test_merges_bone(tmp_path: Path, mode: bool | str) -> None:
    """PEFT 0.21 does not read it any more: its own script renames it to MiSS."""
    case = Case(MissConfig(r=4, target_modules=LAYERS, init_weights=mode))  # type: ignore[arg-type]
    case.run(tmp_path)
    adapter = tmp_path / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name.replace(".miss_", ".bone_"): value for name, value in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("mini_r", "miss_dropout")}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "BONE"}))
    weft.merge(tmp_path / "base", adapter, output=tmp_path / "bone")
    bone = load_file(tmp_path / "bone" / "model.safetensors")
    assert all(torch.equal(bone[name], value) for name, value in case.merged.items())


def test_refuses(tmp_path: Path) -> None:
    config = MissConfig(r=4, target_modules=LAYERS)
    key = "base_model.model.square.miss_block"
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(4, 12)}))
    assert "square.weight is [36, 36]" in message
    assert "square.miss_block [4, 12]" in message
    assert "has rank 4, and" in refusal(config, tmp_path / "rank", r=5)
    message = refusal(config, tmp_path / "bat", init_weights="bat")
    assert "init_weights is 'bat'" in message
    assert "miss_block [4, 36]" in message
    message = refusal(config, tmp_path / "mini", init_weights="mini", mini_r=3)
    assert "mini_r is 3" in message
    assert "init_weights = 'maxi'" in refusal(config, tmp_path / "init", init_weights="maxi")
    other = "base_model.model.square.miss_other"
    assert other in refusal(config, tmp_path / "more", lambda t: t.update({other: torch.ones(1)}))
