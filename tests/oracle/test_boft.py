"""BOFT against PEFT, in float64, by the forward pass and bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft.tuners.boft.layer as boft
import pytest
import torch
from peft import BOFTConfig

from tests.oracle.methods import Case, refusal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MATRICES = ["linear", "square", "wide"]
LAYERS = [*MATRICES, "conv2", "point"]


class BlockDiagonal:
    """What PEFT's CUDA extension computes; without it PEFT has one factor only."""

    def forward(self, factors: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*blocks) for blocks in factors])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"boft_block_size": 4},
        {"boft_block_size": 0, "boft_block_num": 4},
        {"boft_block_size": 4, "bias": "boft_only"},
        {"boft_block_size": 6, "boft_n_butterfly_factor": 2, "target_modules": MATRICES[:1]},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 3, "target_modules": ["linear"]},
        {"boft_block_size": 6, "boft_n_butterfly_factor": 2, "target_modules": ["conv2"]},
    ],
    ids=str,
)
def test_merges(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    several = options.get("boft_n_butterfly_factor", 1) > 1
    monkeypatch.setattr(boft, "_FBD_CUDA", BlockDiagonal() if several else None)
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: boft._FBD_CUDA)
    case = Case(BOFTConfig(**{"target_modules": LAYERS, **options}), dtype)
    case.run(tmp_path)
    theirs = case.peft_merged(tmp_path)
    for name in MATRICES if not several else ():
        assert torch.equal(case.merged[f"{name}.weight"], theirs[f"{name}.weight"]), name


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> BOFTConfig:
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: None)
    return BOFTConfig(boft_block_size=4, target_modules=MATRICES)


@pytest.mark.parametrize("name", ["boft_R", "boft_s"])
def test_missing_tensor(tmp_path: Path, config: BOFTConfig, name: str) -> None:
    error = refusal(config, tmp_path, lambda tensors: tensors.pop(f"base_model.model.wide.{name}"))
    assert f"module 'wide' in {tmp_path}" in error
    assert f"and lacks {name}" in error


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("boft_R", (1, 8, 4, 4)),
        ("boft_R", (2, 9, 4, 4)),
        ("boft_R", (9, 4, 4)),
        ("boft_R", (1, 9, 4, 3)),
        ("boft_s", (36, 1)),
        ("boft_s", (48, 2)),
    ],
)
def test_wrong_shape(tmp_path: Path, config: BOFTConfig, name: str, shape: tuple[int, ...]) -> None:
    key = f"base_model.model.wide.{name}"
    error = refusal(config, tmp_path, lambda tensors: tensors.update({key: torch.ones(shape)}))
    assert "wide" in error
    assert f"{name} {list(shape)}" in error
    assert "adapter_model.safetensors" in error
