"""SHiRA against PEFT, in float64, by the forward pass and bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import ShiraConfig
from safetensors.torch import load_file, save_file

import weft
from tests.oracle.methods import Case, refusal
from weft.core.blocks import BLOCK, STRIP

if TYPE_CHECKING:
    from pathlib import Path

# Torch says once that PEFT's sparse tensors are not checked.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
LAYERS = ["linear", "square", "wide"]
CONFIG = ShiraConfig(target_modules=LAYERS, r=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"r": 2}, {"r": 9, "random_seed": 3}], ids=str)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = Case(ShiraConfig(target_modules=LAYERS, **options), dtype)
    case.run(tmp_path)
    theirs = case.peft_merged(tmp_path)
    assert all(torch.equal(value, theirs[name]) for name, value in case.merged.items())


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    Case(ShiraConfig(target_modules=["wide"], r=3)).run(tmp_path)


@pytest.mark.parametrize("name", ["shira_weight", "shira_indices"])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(f"base_model.model.wide.{name}"))
    assert f"module 'wide' in {tmp_path}" in error
    assert f"and lacks {name}" in error


def test_wrong_shape(tmp_path: Path) -> None:
    change = {"base_model.model.wide.shira_weight": torch.ones(7)}
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert "wide" in error
    assert "shira_weight [7], shira_indices [2, 168]" in error
    assert "adapter_model.safetensors" in error


@pytest.mark.parametrize(("row", "value"), [(0, 48), (1, 36), (1, -1)])
def test_indices_out_of_range(tmp_path: Path, row: int, value: int) -> None:
    key = "base_model.model.wide.shira_indices"
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors[key][row, 5:6].fill_(value))
    assert f"{key} in {tmp_path}" in error
    assert "holds indices outside of 48 × 36" in error


def test_on_windows(tmp_path: Path) -> None:
    """There PEFT saves the indices as float32, and reads them as integers anywhere."""
    Case(CONFIG).merge(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {n: v.float() if "indices" in n else v for n, v in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "again")
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("merged", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_values_that_are_integers(tmp_path: Path) -> None:
    key = "base_model.model.wide.shira_weight"
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors.update({key: tensors[key].long()}))
    assert f"{key} in" in error
    assert "is int64, not a floating type" in error


def test_nan(tmp_path: Path) -> None:
    key = "base_model.model.wide.shira_weight"
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors[key][3:4].fill_(torch.inf))
    assert f"{key} in" in error
    assert "NaN or infinite" in error
