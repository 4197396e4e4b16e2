"""OSF against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import OSFConfig
from safetensors.torch import load_file

from tests.oracle.methods import Case, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide"]
OPTIONS = [
    {"effective_rank": 4},
    {},
    {"effective_rank": 0.9, "rank_pattern": {"wide": 3, "square": 0.25}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merges(tmp_path: Path, options: dict[str, Any]) -> None:
    case = Case(OSFConfig(target_modules=LAYERS, **options))
    case.run(tmp_path)
    case.check_bits(tmp_path)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merges_16_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    """What was trained is the distance to factors that PEFT had rounded to bfloat16.

    So a base that is widened first, as float64 otherwise is the measure, gives another model.
    """
    case = Case(OSFConfig(target_modules=LAYERS, **options), torch.bfloat16)
    case.merge(tmp_path)
    case.check_bits(tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    model = case._load(tmp_path, None)
    for name in LAYERS:
        layer = model.base_model.model.get_submodule(name)
        now = layer.osf_svd_params["default"]
        before = (layer._osf_U_low_init, layer._osf_S_low_init, layer._osf_V_low_init)
        U, S, V = (values["default"] for values in before)
        assert all(torch.equal(value, value.bfloat16().float()) for value in (U, S, V))
        delta = (now["U_low"] * now["S_low"]).double() @ now["V_low"].double()
        delta -= (U * S).double() @ V.double()
        want = (base[f"{name}.weight"].double() + delta).to(torch.bfloat16)
        wrong = (case.merged[f"{name}.weight"] != want).float().mean()
        assert wrong <= 0.01, (name, float(wrong))


CONFIG = OSFConfig(target_modules=LAYERS, effective_rank=4)
WIDE = "base_model.model.wide.osf_svd_params."


@pytest.mark.parametrize("role", ["U_low", "S_low", "V_low"])
def test_missing_tensor(tmp_path: Path, role: str) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(WIDE + role))
    assert f"module 'wide' in {tmp_path}" in message
    assert f"and lacks osf_svd_params.{role}" in message


@pytest.mark.parametrize(
    ("role", "shape", "expected"),
    [
        ("U_low", (47, 32), "wide.weight is [48, 36] in the base"),
        ("S_low", (31,), "do not belong together"),
        ("V_low", (32,), "do not belong together"),
    ],
)
def test_wrong_shape(tmp_path: Path, role: str, shape: tuple[int, ...], expected: str) -> None:
    change = {WIDE + role: torch.ones(shape)}
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert f"{role} {list(shape)}" in message
    assert expected in message


def test_more_than_there_are(tmp_path: Path) -> None:
    change = {"U_low": torch.ones(48, 37), "S_low": torch.ones(37), "V_low": torch.ones(37, 36)}
    message = refusal(
        CONFIG, tmp_path, lambda t: t.update({WIDE + role: v for role, v in change.items()})
    )
    assert "wide.weight is [48, 36] in the base" in message


def test_nan(tmp_path: Path) -> None:
    key = f"{WIDE}S_low"
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[key][2].fill_(torch.nan))
    assert f"{key} in" in message
    assert "NaN or infinite" in message
