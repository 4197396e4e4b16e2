"""FourierFT against PEFT, in float64 and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import FourierFTConfig

from tests.oracle.methods import Case, Turned, refusal
from weft.core.blocks import BLOCK, STRIP
from weft.deltas._places import places

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]
CONFIG = FourierFTConfig(target_modules=LAYERS, n_frequency=50)
TURNED = ["c_fc", "c_proj"]
# PEFT's own transform is one of complex64, whatever the base is.
ATOL = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"n_frequency": 50},
        {"n_frequency": 300, "random_loc_seed": 3, "scaling": 10},
        {"n_frequency": 7, "n_frequency_pattern": {"square": 36 * 36, "wide": 1}},
        {"n_frequency": 50, "bias": "fourier_only"},
    ],
    ids=str,
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    Case(FourierFTConfig(target_modules=LAYERS, **options), dtype, atol=ATOL).run(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_transposed(tmp_path: Path, dtype: torch.dtype) -> None:
    config = FourierFTConfig(target_modules=TURNED, n_frequency=50, fan_in_fan_out=True)
    Case(config, dtype, atol=ATOL, model=Turned).run(tmp_path)


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    monkeypatch.setattr("weft.deltas.fourierft._PHASES", 100)
    Case(FourierFTConfig(target_modules=LAYERS, n_frequency=50), atol=ATOL).run(tmp_path)


@pytest.mark.parametrize("seed", [0, 777, -1])
def test_lots(seed: int) -> None:
    drawn = torch.randperm(7000, generator=torch.Generator().manual_seed(seed))[:500]
    rows, columns = places(70, 100, 500, seed)
    assert torch.equal(rows * 100 + columns, drawn)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((50, 1), "do not belong together"),
        ((51,), "has n_frequency 51, and adapter_config.json says"),
    ],
)
def test_wrong_shape(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    change = {"base_model.model.wide.fourierft_spectrum": torch.ones(shape)}
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert "wide" in error
    assert message in error
    assert "adapter_model.safetensors" in error


def test_more_than_there_are(tmp_path: Path) -> None:
    change = {"base_model.model.wide.fourierft_spectrum": torch.ones(48 * 36 + 1)}
    error = refusal(
        CONFIG,
        tmp_path,
        lambda tensors: tensors.update(change),
        n_frequency_pattern={"wide": 48 * 36 + 1},
    )
    assert "wide.weight is [48, 36] in the base" in error
    assert "fourierft_spectrum [1729]" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling": "x"}, "scaling = 'x', and must be a number"),
        ({"random_loc_seed": None}, "random_loc_seed = None, and must be an integer"),
        ({"n_frequency_pattern": ["a"]}, "n_frequency_pattern = ['a'], and must be a mapping"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in refusal(CONFIG, tmp_path, **change)
