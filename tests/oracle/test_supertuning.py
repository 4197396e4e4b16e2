"""Super-Tuning against PEFT, in float64, by the forward pass and bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import SupertuningConfig

from tests.oracle.methods import Case, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"sparsity": 0.0}, {"select_top": False}, {"r": 4}, {"r": 3, "lora_alpha": 5}],
    ids=str,
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    config = SupertuningConfig(**{"target_modules": LAYERS, "sparsity": 0.9, **options})
    case = Case(config, dtype)
    case.run(tmp_path)
    if "r" not in options and dtype == torch.float32:
        case.check_bits(tmp_path)


SUPER = SupertuningConfig(target_modules=LAYERS, sparsity=0.9)
SUPRA = SupertuningConfig(target_modules=LAYERS, sparsity=0.9, r=4)
WIDE = "base_model.model.wide.supertuning_"


@pytest.mark.parametrize("name", ["values", "indices", "lora_A.weight", "lora_B.weight"])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    message = refusal(SUPRA, tmp_path, lambda tensors: tensors.pop(WIDE + name))
    assert f"module 'wide' in {tmp_path}" in message
    assert f"and lacks supertuning_{name}" in message


@pytest.mark.parametrize(
    ("name", "shape"), [("values", (5,)), ("indices", (2, 172)), ("lora_A.weight", (3, 36))]
)
def test_wrong_shape(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    change = {WIDE + name: torch.ones(shape)}
    message = refusal(SUPRA, tmp_path, lambda tensors: tensors.update(change))
    assert f"module 'wide' in {tmp_path}" in message
    assert f"supertuning_{name} {list(shape)}" in message


def test_index_out_of_range(tmp_path: Path) -> None:
    key = f"{WIDE}indices"
    message = refusal(SUPER, tmp_path, lambda tensors: tensors[key][7].fill_(48 * 36))
    assert f"{key} in {tmp_path}" in message
    assert "holds indices outside of 1728" in message


def test_more_than_the_config_says(tmp_path: Path) -> None:
    message = refusal(SUPRA, tmp_path, r=None, lora_alpha=None)
    assert "supertuning_lora_A.weight" in message
    assert "belong to nothing that SUPERTUNING has" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"r": 5}, "has rank 4, and adapter_config.json says r = 5"),
        ({"r": 0}, "r = 0, and must be a whole number above 0, or null"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x', and must be a number, or null"),
        ({"save_precomputed_indices": False}, "does not say which weights were trained"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    assert expected in refusal(SUPRA, tmp_path, **change)
