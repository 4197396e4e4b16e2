"""VB-LoRA against PEFT, in float64, by the forward pass and bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import VBLoRAConfig

from tests.oracle.methods import Case, Turned

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]
TURNED = ["c_attn", "c_fc", "c_proj"]
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


@pytest.fixture(params=[False, True], ids=["logits", "topk"])
def case(request: pytest.FixtureRequest) -> Case:
    config = VBLoRAConfig(target_modules=LAYERS, save_only_topk_weights=request.param, **SIZES)
    return Case(config)


def test_missing_tensor(tmp_path: Path, case: Case) -> None:
    name = "vblora_logits_B"
    name += "_topk_indices" if case.config.save_only_topk_weights else ""
    error = case.refused(tmp_path, lambda tensors: tensors.pop(f"base_model.model.wide.{name}"))
    assert f"module 'wide' in {tmp_path}" in error
    assert f"and lacks {name}" in error


def test_missing_bank(tmp_path: Path, case: Case) -> None:
    key = "base_model.vblora_vector_bank"
    error = case.refused(tmp_path, lambda tensors: tensors.pop(key))
    assert f"adapter_model.safetensors has no {key}" in error


def test_bank_for_nobody(tmp_path: Path, case: Case) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "logits" in key]:
            del tensors[key]

    error = case.refused(tmp_path, change)
    assert "'base_model.vblora_vector_bank' in" in error
    assert "shared by no module" in error


@pytest.mark.parametrize("shape", [(10,), (11, 6), (10, 6, 1), (1, 6)])
def test_wrong_bank(tmp_path: Path, shape: tuple[int, ...]) -> None:
    case = Case(VBLoRAConfig(target_modules=LAYERS, **SIZES))
    change = {"base_model.vblora_vector_bank": torch.ones(shape)}
    error = case.refused(tmp_path, lambda tensors: tensors.update(change))
    assert "vblora_logits_A [2, 6, 10]" in error
    assert f"do not go together with a bank of {list(shape)} and topk = 2" in error


@pytest.mark.parametrize("shape", [(8, 3, 10), (8, 3, 1), (8, 2, 9), (8,)])
def test_wrong_shape(tmp_path: Path, case: Case, shape: tuple[int, ...]) -> None:
    topk = case.config.save_only_topk_weights
    name = "vblora_logits_B_topk_weights" if topk else "vblora_logits_B"
    change = {f"base_model.model.wide.{name}": torch.ones(shape)}
    error = case.refused(tmp_path, lambda tensors: tensors.update(change))
    assert "module 'wide' in" in error
    assert "do not go together" in error


def test_wrong_length(tmp_path: Path, case: Case) -> None:
    change = {"base_model.vblora_vector_bank": torch.ones(10, 4)}
    error = case.refused(tmp_path, lambda tensors: tensors.update(change))
    assert "wide.weight is [48, 36] in the base" in error


def test_index_out_of_range(tmp_path: Path) -> None:
    case = Case(VBLoRAConfig(target_modules=LAYERS, save_only_topk_weights=True, **SIZES))
    key = "base_model.model.wide.vblora_logits_A_topk_indices"
    error = case.refused(tmp_path, lambda tensors: tensors[key][0, 0].fill_(10))
    assert f"{key} in {tmp_path}" in error
    assert "holds indices outside of 10" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [({"topk": 0}, "topk = 0, and must be a whole number above 0"), ({"r": 3}, "has rank 2")],
)
def test_wrong_config(tmp_path: Path, case: Case, change: dict[str, Any], message: str) -> None:
    assert message in case.refused(tmp_path, **change)
