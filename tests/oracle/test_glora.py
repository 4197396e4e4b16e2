"""GLoRA against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import GloraConfig

from tests.oracle.methods import Case, refusal
from weft.core.blocks import BLOCK, STRIP

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]  # `square` has no bias
FORMS = [
    {"config_A_B": ab, "config_C": c, "config_D_E": de}
    for ab, c, de in [
        ("lora", "lora", "constant"),
        ("vector", "vector", "vector"),
        ("constant", "none", "none"),
        ("none", "lora", "none"),
        ("lora", "none", "vector"),
    ]
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [*FORMS, {"bias": "glora_only"}], ids=str)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = Case(GloraConfig(r=3, target_modules=LAYERS, **options), dtype)
    case.run(tmp_path)
    if dtype == torch.float32:
        case.check_bits(tmp_path)


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setattr("weft.deltas.glora_bias.BLOCK", {"cpu": 1})
    monkeypatch.setitem(STRIP, "cpu", 1)
    Case(GloraConfig(r=3, target_modules=LAYERS)).run(tmp_path)


CONFIG = GloraConfig(r=3, target_modules=LAYERS)
WIDE = "base_model.model.wide.glora_"


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["A.Xd"], "glora_A.Xd"), (["A.Xd", "A.Xu"], "glora_A"), (["E.X"], "glora_E")],
)
def test_missing_tensor(tmp_path: Path, names: list[str], expected: str) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: [tensors.pop(WIDE + n) for n in names])
    assert f"module 'wide' in {tmp_path}" in message
    assert f"and lacks {expected}" in message


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("A.Xd", (47, 3), "wide.weight is [48, 36] in the base"),
        ("A.Xd", (48, 2), "do not belong together"),
        ("A.Xd", (48,), "do not belong together"),
        ("C.Xd", (35, 3), "wide.bias is [48] in the base"),
        ("D.X", (2,), "wide.bias is [48] in the base"),
        ("E.X", (48, 1), "wide.bias is [48] in the base"),
    ],
)
def test_wrong_shape(tmp_path: Path, name: str, shape: tuple[int, ...], expected: str) -> None:
    change = {WIDE + name: torch.ones(shape)}
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert f"glora_{name} {list(shape)}" in message
    assert expected in message


def test_nan(tmp_path: Path) -> None:
    key = f"{WIDE}C.Xu"
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[key][0, 0].fill_(torch.nan))
    assert f"{key} in" in message
    assert "NaN or infinite" in message
