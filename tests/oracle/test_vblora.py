"""VB-LoRA against PEFT, in float64, by the forward pass and bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import VBLoRAConfig

from tests.oracle.methods import Case, Turned, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]
TURNED = ["c_fc", "c_proj"]
SIZES = {"r": 2, "num_vectors": 10, "vector_length": 6, "init_vector_bank_bound": 0.5}
OPTIONS = [
    {},
    {"topk": 1},
    {"topk": 10},
    {"save_only_topk_weights": True},
    {"save_only_topk_weights": True, "topk": 1},
    {"save_only_topk_weights": True, "topk": 4, "num_vectors": 300},
    {"bias": "vblora_only"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = Case(VBLoRAConfig(target_modules=LAYERS, **{**SIZES, **options}), dtype)
    case.run(tmp_path)
    if not options.get("save_only_topk_weights"):
        theirs = case.peft_merged(tmp_path)
        assert all(torch.equal(value, theirs[name]) for name, value in case.merged.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topk", [False, True])
def test_stored_transposed(tmp_path: Path, dtype: torch.dtype, topk: bool) -> None:
    config = VBLoRAConfig(
        target_modules=TURNED, fan_in_fan_out=True, save_only_topk_weights=topk, **SIZES
    )
    case = Case(config, dtype, model=Turned)
    case.run(tmp_path)
    if not topk:
        theirs = case.peft_merged(tmp_path)
        assert all(torch.equal(value, theirs[name]) for name, value in case.merged.items())


LOGITS = VBLoRAConfig(target_modules=LAYERS, **SIZES)
TOPK = VBLoRAConfig(target_modules=LAYERS, save_only_topk_weights=True, **SIZES)
BANK = "base_model.vblora_vector_bank"


@pytest.mark.parametrize(
    ("config", "name"), [(LOGITS, "vblora_logits_B"), (TOPK, "vblora_logits_B_topk_indices")]
)
def test_missing_tensor(tmp_path: Path, config: VBLoRAConfig, name: str) -> None:
    error = refusal(config, tmp_path, lambda tensors: tensors.pop(f"base_model.model.wide.{name}"))
    assert f"module 'wide' in {tmp_path}" in error
    assert f"and lacks {name}" in error


@pytest.mark.parametrize("config", [LOGITS, TOPK])
def test_missing_bank(tmp_path: Path, config: VBLoRAConfig) -> None:
    error = refusal(config, tmp_path, lambda tensors: tensors.pop(BANK))
    assert f"adapter_model.safetensors has no {BANK}" in error


def test_bank_for_nobody(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "logits" in key]:
            del tensors[key]

    assert f"no module of the adapter has a use for {BANK}" in refusal(LOGITS, tmp_path, change)


@pytest.mark.parametrize("shape", [(10,), (11, 6), (10, 6, 1), (1, 6)])
def test_wrong_bank(tmp_path: Path, shape: tuple[int, ...]) -> None:
    error = refusal(LOGITS, tmp_path, lambda tensors: tensors.update({BANK: torch.ones(shape)}))
    assert "vblora_logits_A [2, 6, 10]" in error
    assert f"do not fit {BANK} {list(shape)} and topk = 2" in error


@pytest.mark.parametrize("shape", [(8, 3, 10), (8, 3, 1), (8, 2, 9), (8,)])
@pytest.mark.parametrize(
    ("config", "name"), [(LOGITS, "vblora_logits_B"), (TOPK, "vblora_logits_B_topk_weights")]
)
def test_wrong_shape(
    tmp_path: Path, config: VBLoRAConfig, name: str, shape: tuple[int, ...]
) -> None:
    change = {f"base_model.model.wide.{name}": torch.ones(shape)}
    error = refusal(config, tmp_path, lambda tensors: tensors.update(change))
    assert "module 'wide' in" in error
    assert f"{name} {list(shape)}" in error
    assert "do not belong together" in error


@pytest.mark.parametrize("config", [LOGITS, TOPK])
def test_wrong_length(tmp_path: Path, config: VBLoRAConfig) -> None:
    error = refusal(config, tmp_path, lambda tensors: tensors.update({BANK: torch.ones(10, 4)}))
    assert "wide.weight is [48, 36] in the base" in error


def test_index_out_of_range(tmp_path: Path) -> None:
    key = "base_model.model.wide.vblora_logits_A_topk_indices"
    error = refusal(TOPK, tmp_path, lambda tensors: tensors[key][0, 0].fill_(10))
    assert f"{key} in {tmp_path}" in error
    assert "holds indices outside of 10" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [({"topk": 0}, "topk = 0, and must be a whole number above 0"), ({"r": 3}, "has rank 2")],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in refusal(LOGITS, tmp_path, **change)
