"""UniLoRA against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import UniLoraConfig

from tests.oracle.methods import Case, Turned, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]
TURNED = ["c_fc", "c_proj"]
SIZES = {"r": 3, "save_indices": True, "init_theta_d_bound": 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"theta_d_length": 1000, "proj_seed": 3}, {"bias": "unilora_only"}],
    ids=str,
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = Case(UniLoraConfig(target_modules=LAYERS, **SIZES, **options), dtype)
    case.run(tmp_path)
    case.check_bits(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_transposed(tmp_path: Path, dtype: torch.dtype) -> None:
    config = UniLoraConfig(target_modules=TURNED, fan_in_fan_out=True, **SIZES)
    case = Case(config, dtype, model=Turned)
    case.run(tmp_path)
    case.check_bits(tmp_path)


CONFIG = UniLoraConfig(target_modules=LAYERS, **SIZES)
WIDE = "base_model.model.wide.unilora_"
THETA = "base_model.unilora_theta_d"


@pytest.mark.parametrize("name", ["indices_A", "scales_A", "indices_B", "scales_B"])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(WIDE + name))
    assert f"module 'wide' in {tmp_path}" in message
    assert f"and lacks unilora_{name}" in message


def test_missing_vector(tmp_path: Path) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(THETA))
    assert f"adapter_model.safetensors has no {THETA}" in message


def test_wrong_vector(tmp_path: Path) -> None:
    change = {THETA: torch.ones(16, 16)}
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert f"{THETA} in {tmp_path}" in message
    assert "is [16, 16], and no vector" in message


@pytest.mark.parametrize(
    ("name", "shape"), [("indices_B", (48, 2)), ("scales_A", (36, 3)), ("scales_A", (3,))]
)
def test_wrong_shape(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    change = {WIDE + name: torch.ones(shape)}
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert f"unilora_{name} {list(shape)}" in message
    assert "do not belong together" in message


@pytest.mark.parametrize("index", [256, -1])
def test_index_out_of_range(tmp_path: Path, index: int) -> None:
    key = f"{WIDE}indices_B"
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[key][5, 1].fill_(index))
    assert f"{key} in {tmp_path}" in message
    assert "holds indices outside of 256" in message


def test_without_indices(tmp_path: Path) -> None:
    config = UniLoraConfig(target_modules=LAYERS, r=3)
    assert "does not say which values of its vector each module takes" in refusal(config, tmp_path)


def test_nan(tmp_path: Path) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[THETA][7].fill_(torch.nan))
    assert f"{THETA} in" in message
    assert "NaN or infinite" in message
