"""DEFT and PaRa against PEFT, in float64 and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import DeftConfig

from tests.oracle.methods import Case, Turned, refusal
from weft.core.blocks import BLOCK, STRIP

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide", "head"]
TURNED = ["c_fc", "c_proj"]
OPTIONS = [
    {},
    {"alpha": 7},
    {"r": 12, "alpha": 7},  # of which `head` has 10
    {"decomposition_method": "qr"},
    {"decomposition_method": "qr", "alpha": 7},
    {"para": True},
    {"para": True, "decomposition_method": "qr"},
    {"init_weights": False},
    {"bias": "deft_only"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    # PEFT's own arithmetic is float32, whatever the base is.
    Case(DeftConfig(**{"r": 4, "target_modules": LAYERS, **options}), dtype).run(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS[3:6], ids=str)
def test_stored_transposed(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    config = DeftConfig(r=4, target_modules=TURNED, fan_in_fan_out=True, **options)
    Case(config, dtype, model=Turned).run(tmp_path)


@pytest.mark.parametrize("model", [None, Turned])
def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    if model:
        config = DeftConfig(r=4, target_modules=TURNED, fan_in_fan_out=True)
        Case(config, model=Turned).run(tmp_path)
    else:
        Case(DeftConfig(r=4, target_modules=LAYERS)).run(tmp_path)


CONFIG = DeftConfig(r=4, target_modules=LAYERS)
WIDE = "base_model.model.wide.deft_"


@pytest.mark.parametrize("role", ["P", "R"])
def test_missing_tensor(tmp_path: Path, role: str) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(WIDE + role))
    assert f"module 'wide' in {tmp_path}" in message
    assert f"and lacks deft_{role}" in message


@pytest.mark.parametrize(
    ("role", "shape", "expected"),
    [
        ("P", (47, 4), "wide.weight is [48, 36] in the base"),
        ("P", (48, 3), "do not belong together"),
        ("R", (4,), "do not belong together"),
        ("R", (4, 35), "wide.weight is [48, 36] in the base"),
    ],
)
def test_wrong_shape(tmp_path: Path, role: str, shape: tuple[int, ...], expected: str) -> None:
    change = {WIDE + role: torch.ones(shape)}
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert "wide" in message
    assert f"deft_{role} {list(shape)}" in message
    assert expected in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"decomposition_method": "svd"}, "'svd', and must be one of 'relu', 'qr'"),
        ({"r": 5}, "are not of the rank 5 that the config says"),
        ({"para": True}, "deft_R in"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    assert expected in refusal(CONFIG, tmp_path, **change)


def test_nan(tmp_path: Path) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[f"{WIDE}R"][2, 3].fill_(torch.nan))
    assert f"{WIDE}R in" in message
    assert "NaN or infinite" in message
