"""TinyLoRA against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import TinyLoraConfig

from tests.oracle.methods import Case, Turned, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["embed", "linear", "square", "wide", "head"]
TURNED = ["c_fc", "c_proj"]
SIZES = {"r": 2, "u": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        *({"weight_tying": share} for share in (0.0, 0.3, 0.5, 0.9, 1.0)),
        {"r": 5, "u": 20, "projection_seed": 7},
        {"bias": "tinylora_only"},
    ],
    ids=str,
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = Case(TinyLoraConfig(**{"target_modules": LAYERS, **SIZES, **options}), dtype)
    case.run(tmp_path)
    case.check_bits(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_transposed(tmp_path: Path, dtype: torch.dtype) -> None:
    config = TinyLoraConfig(target_modules=TURNED, fan_in_fan_out=True, **SIZES)
    case = Case(config, dtype, model=Turned)
    case.run(tmp_path)
    case.check_bits(tmp_path)


CONFIG = TinyLoraConfig(target_modules=LAYERS, **SIZES)
WIDE = "base_model.model.wide.tinylora_"


@pytest.mark.parametrize("role", ["A", "B", "P"])
def test_missing_tensor(tmp_path: Path, role: str) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(WIDE + role))
    assert f"module 'wide' in {tmp_path}" in message
    assert f"and lacks tinylora_{role}" in message


@pytest.mark.parametrize("key", ["base_model.tinylora_v.2", "base_model.tinylora_v.4"])
def test_missing_vector(tmp_path: Path, key: str) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(key))
    assert f"lacks {key}: its 5 modules with weight_tying = 0.0 share 5 vectors" in message


def test_missing_module(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for role in "ABP":
            del tensors[WIDE + role]

    message = refusal(
        TinyLoraConfig(target_modules=LAYERS, weight_tying=0.5, **SIZES), tmp_path, edit
    )
    assert "is not what projection_seed = 42 gives for any one of 4 modules" in message


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("A", (2, 35), "wide.weight is [48, 36] in the base"),
        ("B", (48, 3), "do not belong together"),
        ("P", (3, 2), "do not belong together"),
        ("P", (4, 2, 2), "does not fit tinylora_P [4, 2, 2] of module 'wide'"),
    ],
)
def test_wrong_shape(tmp_path: Path, name: str, shape: tuple[int, ...], expected: str) -> None:
    change = {WIDE + name: torch.ones(shape)}
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert f"tinylora_{name} {list(shape)}" in message
    assert expected in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"projection_seed": 7}, "is not what projection_seed = 7 gives for any one of 5 modules"),
        ({"weight_tying": None}, "weight_tying = None, and must be a number"),
        ({"save_projection": False}, "the file does not hold its projections"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    assert expected in refusal(CONFIG, tmp_path, **change)


def test_nan(tmp_path: Path) -> None:
    key = "base_model.tinylora_v.3"
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[key][2].fill_(torch.nan))
    assert f"{key} in" in message
    assert "NaN or infinite" in message
