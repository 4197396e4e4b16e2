"""PEANuT against PEFT, in float64 and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeanutConfig
from transformers.activations import ACT2FN

from tests.oracle.methods import Case, refusal
from weft.core.blocks import BLOCK, STRIP
from weft.deltas.peanut import ACTIVATIONS
from weft.formats.adapters._peft_methods import peanut

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 1, "scaling": 0.3},
        {"depth": 3, "act_fn": "gelu"},
        {"depth": 2, "act_fn": "linear"},
    ],
    ids=str,
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    Case(PeanutConfig(r=4, target_modules=LAYERS, **options), dtype).run(tmp_path)


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    Case(PeanutConfig(r=4, depth=2, target_modules=LAYERS)).run(tmp_path)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str) -> None:
    values = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](values), ACT2FN[name](values))


def test_activations_are_those_that_the_reader_knows() -> None:
    assert set(peanut._ACTIVATIONS) == set(ACTIVATIONS)


CONFIG = PeanutConfig(r=4, depth=2, target_modules=LAYERS)
WIDE = "base_model.model.wide.peanut_"


@pytest.mark.parametrize("name", ["A", "B", "encoders.1", "decoders.0"])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(f"{WIDE}{name}.weight"))
    assert f"module 'wide' in {tmp_path}" in message
    assert f"and lacks peanut_{name}.weight" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [("A", (4, 47)), ("B", (48, 3)), ("encoders.1", (4,)), ("decoders.0", (3, 3))],
)
def test_wrong_shape(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    change = {f"{WIDE}{name}.weight": torch.ones(shape)}
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert f"peanut_{name}.weight {list(shape)}" in message
    assert "do not belong together" in message


def test_another_base(tmp_path: Path) -> None:
    change = {f"{WIDE}A.weight": torch.ones(4, 47), f"{WIDE}B.weight": torch.ones(47, 4)}
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert "wide.weight is [48, 36] in the base" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"act_fn": "xielu"}, "act_fn = 'xielu', and must be one of 'relu'"),
        ({"depth": 1}, "belong to nothing that PEANUT has"),
        ({"depth": 65}, "depth = 65, and must be from 0 to 64"),
        ({"scaling": None}, "scaling = None, and must be a number"),
        ({"r": 5}, "has rank 4, and adapter_config.json says r = 5"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    assert expected in refusal(CONFIG, tmp_path, **change)


def test_nan(tmp_path: Path) -> None:
    key = f"{WIDE}encoders.1.weight"
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[key][2, 3].fill_(torch.nan))
    assert f"{key} in" in message
    assert "NaN or infinite" in message
