"""FRoD against PEFT, in float64 and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import FrodConfig
from peft.tuners.frod.model import _category_from_key
from safetensors.torch import load_file
from torch import nn

import weft
from tests.oracle.methods import Case, Turned, refusal
from weft.core.blocks import BLOCK, STRIP
from weft.formats.adapters._peft_methods import frod

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # Torch says once that PEFT's sparse tensors are not checked.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

LAYERS = ["linear", "square", "wide", "head"]  # of which `head` has more inputs than outputs
TURNED = ["c_fc", "c_proj"]
QUIET = {"progressbar": False}


OPTIONS = [
    {},
    {"sparse_rate": 0.2, "projection_prng_key": 3},
    {"sparse_rate": 0.0},
    {"bias": "frod_only"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merges(tmp_path: Path, options: dict[str, Any]) -> None:
    Case(FrodConfig(target_modules=LAYERS, **QUIET, **options)).run(tmp_path)


def test_stored_transposed(tmp_path: Path) -> None:
    Case(FrodConfig(target_modules=TURNED, **QUIET), model=Turned).run(tmp_path)


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    Case(FrodConfig(target_modules=LAYERS, **QUIET)).run(tmp_path)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merges_16_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    """By the formula: PEFT would make V of the widened base, and U of that, before it loads V."""
    case = Case(FrodConfig(target_modules=LAYERS, **QUIET, **options), torch.bfloat16)
    case.merge(tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in LAYERS:
        W = base[f"{name}.weight"].double()
        V = saved[f"base_model.frod_V.{name}"].double()
        U = torch.linalg.solve(V, W.T).T
        U = U / U.norm(dim=0)
        core = torch.diag(saved[f"base_model.model.{name}.frod_lambda_l"].double())
        rows, columns = saved[f"base_model.frod_s_indices.{name}"]
        core[rows, columns] += saved[f"base_model.model.{name}.frod_lambda_s_values"].double()
        want = (U @ core @ V.T).to(torch.bfloat16)
        wrong = (case.merged[f"{name}.weight"] != want).float().mean()
        assert wrong <= 0.01, (name, float(wrong))


@pytest.mark.parametrize(
    "name",
    [
        *("linear", "layers.3", "model.layers.3.self_attn.q_proj", "encoder.layer.0.output.dense"),
        *(
            "encoder.layer.0.attention.output.dense",
            "h.1.attn.c_attn",
            "output.dense",
            "blocks.7.x",
        ),
    ],
)
def test_categories(name: str) -> None:
    assert frod._category(name) == _category_from_key(name)


CONFIG = FrodConfig(target_modules=LAYERS, **QUIET)
WIDE = "base_model.model.wide.frod_"


@pytest.mark.parametrize("role", ["lambda_l", "lambda_s_values"])
def test_missing_tensor(tmp_path: Path, role: str) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(WIDE + role))
    assert f"module 'wide' in {tmp_path}" in message
    assert f"and lacks frod_{role}" in message


@pytest.mark.parametrize("role", ["V", "s_indices", "s_size"])
def test_missing_projection(tmp_path: Path, role: str) -> None:
    key = f"base_model.frod_{role}.wide"
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(key))
    assert f"adapter_model.safetensors lacks {key}, which 'wide' needs" in message


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        (f"{WIDE}lambda_l", (35,), "do not fit base_model.frod_V.wide [36, 36]"),
        (f"{WIDE}lambda_s_values", (3,), "do not fit base_model.frod_s_indices.wide [2, 12]"),
        ("base_model.frod_V.wide", (36, 35), "do not fit base_model.frod_V.wide [36, 35]"),
        ("base_model.frod_s_size.wide", (3,), "do not fit base_model.frod_s_size.wide [3]"),
    ],
)
def test_wrong_shape(tmp_path: Path, key: str, shape: tuple[int, ...], expected: str) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.update({key: torch.ones(shape)}))
    assert "module 'wide' in" in message
    assert expected in message


def test_index_out_of_range(tmp_path: Path) -> None:
    key = "base_model.frod_s_indices.wide"
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[key][1, 4].fill_(36))
    assert f"{key} in {tmp_path}" in message
    assert "holds indices outside of 36 × 36" in message


def test_without_projections(tmp_path: Path) -> None:
    message = refusal(FrodConfig(target_modules=LAYERS, save_projection=False, **QUIET), tmp_path)
    assert "the file does not hold its projections" in message


def test_nan(tmp_path: Path) -> None:
    key = "base_model.frod_V.square"
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[key][2, 3].fill_(torch.nan))
    assert f"{key} in" in message
    assert "NaN or infinite" in message


class Layers(nn.Module):
    """Two roles, in more layers than factors of neighbours are held."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(24, 36), "down": nn.Linear(36, 24)}) for _ in range(6)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer["down"](layer["up"](hidden).tanh())
        return hidden


def test_a_basis_is_inverted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inverted = []
    invert = torch.linalg.inv_ex

    def counted(matrix: torch.Tensor) -> Any:
        inverted.append(matrix.shape)
        return invert(matrix)

    case = Case(FrodConfig(target_modules=["up", "down"], **QUIET), model=Layers)
    case.merge(tmp_path)
    monkeypatch.setattr(torch.linalg, "inv_ex", counted)
    weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "again")
    assert sorted(inverted) == [(24, 24), (36, 36)]
    monkeypatch.undo()
    case.check_values(tmp_path)
