"""RandLoRA against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import RandLoraConfig
from safetensors.torch import load_file, save_file

import weft
from tests.oracle.methods import Case, Toy, Turned, refusal

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Specified to not (save|load) (basis|randlora)_A:UserWarning"
    ),
]

LAYERS = ["linear", "square", "wide", "head"]  # longer outputs, neither, longer outputs, inputs
TURNED = ["c_fc", "c_proj"]
SIZES = {"r": 5, "randlora_alpha": 7, "projection_prng_key": 3}
DRAWN = {"save_projection": False}
SPARSE = [{}, {"sparse": True}, {"very_sparse": True}]


def check_bits(case: Case, folder: Path) -> None:
    """In float32, for matrices of 16 rows or more (on a 16-bit base PEFT rounds ΔW by itself)."""
    theirs = case.peft_merged(folder)
    for name, value in case.merged.items():
        assert name == "head.weight" or torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [*SPARSE, {"bias": "randlora_only"}], ids=str)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = Case(RandLoraConfig(target_modules=LAYERS, **SIZES, **options), dtype)
    case.run(tmp_path)
    if dtype == torch.float32:
        check_bits(case, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_transposed(tmp_path: Path, dtype: torch.dtype) -> None:
    case = Case(RandLoraConfig(target_modules=TURNED, **SIZES), dtype, model=Turned)
    case.run(tmp_path)
    if dtype == torch.float32:
        check_bits(case, tmp_path)


@pytest.mark.parametrize("layers", [LAYERS, LAYERS[:1], TURNED], ids=str)
@pytest.mark.parametrize("options", SPARSE, ids=str)
def test_draws_projections(tmp_path: Path, layers: list[str], options: dict[str, Any]) -> None:
    """A and B of the size that the largest module asks for, which the file does not tell."""
    config = RandLoraConfig(target_modules=layers, **SIZES, **options, **DRAWN)
    case = Case(config, model=Turned if layers is TURNED else Toy)
    case.run(tmp_path)
    check_bits(case, tmp_path)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(key.endswith(("_lambda", "_gamma")) for key in tensors)


@pytest.mark.parametrize("options", SPARSE, ids=str)
def test_draws_projections_of_the_dtype_of_the_base(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Drawn again, and saved by a PEFT that had the same base, they are the same to the bit."""
    layers = {"target_modules": LAYERS, **SIZES, **options}
    saved = Case(RandLoraConfig(**layers), torch.bfloat16)
    saved.merge(tmp_path / "saved")
    drawn = Case(RandLoraConfig(**layers, **DRAWN), torch.bfloat16)
    drawn.merge(tmp_path / "drawn")
    assert all(torch.equal(value, drawn.merged[name]) for name, value in saved.merged.items())


def test_saved_once(tmp_path: Path) -> None:
    """Without the copies that PEFT saves with every module."""
    case = Case(RandLoraConfig(target_modules=LAYERS, **SIZES))
    case.merge(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    copies = (".randlora_A", ".randlora_B")
    once = {
        key: value
        for key, value in load_file(file).items()
        if not (key.startswith("base_model.model.") and key.endswith(copies))
    }
    assert len(once) == 2 + 2 * len(LAYERS)
    save_file(once, file, {"format": "pt"})
    weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in case.merged.items())


CONFIG = RandLoraConfig(target_modules=LAYERS, **SIZES)
WIDE = "base_model.model.wide.randlora_"


@pytest.mark.parametrize("role", ["lambda", "gamma"])
def test_missing_tensor(tmp_path: Path, role: str) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.pop(WIDE + role))
    assert f"module 'wide' in {tmp_path}" in message
    assert f"and lacks randlora_{role}" in message


def test_missing_projections(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(("_A", "_B"))]:
            del tensors[key]

    message = refusal(CONFIG, tmp_path, edit)
    assert "lacks randlora_A, randlora_B" in message


def test_copies_that_differ(tmp_path: Path) -> None:
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[f"{WIDE}B"][3, 2, 1].add_(1))
    assert f"'{WIDE}B' and 'base_model.randlora_B' in {tmp_path}" in message
    assert "differ" in message


@pytest.mark.parametrize(
    ("role", "shape", "expected"),
    [
        ("lambda", (5, 7), "do not belong together"),
        ("gamma", (8, 35), "wide.weight is [48, 36] in the base"),
        ("gamma", (8,), "do not belong together"),
        ("lambda", (4, 8), "do not belong together"),
    ],
)
def test_wrong_shape(tmp_path: Path, role: str, shape: tuple[int, ...], expected: str) -> None:
    change = {WIDE + role: torch.ones(shape)}
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert "wide" in message
    assert f"randlora_{role} {list(shape)}" in message
    assert expected in message


@pytest.mark.parametrize("shape", [(5, 1, 35), (5, 1)])
def test_projection_of_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("randlora_A")]:
            tensors[key] = torch.ones(shape)

    message = refusal(CONFIG, tmp_path, edit)
    assert "wide" in message
    assert f"randlora_A {list(shape)}" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"randlora_alpha": None}, "randlora_alpha = None, and must be a number"),
        ({"projection_prng_key": 2**70}, "and must be an integer"),
        ({"r": 6}, "has rank 5, and adapter_config.json says r = 6"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in refusal(CONFIG, tmp_path, **change)


def test_nan(tmp_path: Path) -> None:
    key = f"{WIDE}gamma"
    message = refusal(CONFIG, tmp_path, lambda tensors: tensors[key][2, 3].fill_(torch.nan))
    assert f"{key} in" in message
    assert "NaN or infinite" in message
