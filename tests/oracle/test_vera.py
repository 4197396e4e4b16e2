"""VeRA and PVeRA against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PveraConfig, VeraConfig
from safetensors.torch import load_file

from tests.oracle.methods import Case, Turned, refusal

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) p?vera_A:UserWarning"),
]

KINDS = pytest.mark.parametrize("kind", [VeraConfig, PveraConfig])
LAYERS = ["linear", "square", "wide"]


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [LAYERS, ["c_fc", "c_proj"]], ids=["linear", "conv1d"])
def test_merges(tmp_path: Path, kind: Any, dtype: torch.dtype, layers: list[str]) -> None:
    config = kind(r=5, target_modules=layers, projection_prng_key=7)
    case = Case(config, dtype, **({} if layers is LAYERS else {"model": Turned}))  # type: ignore[arg-type]
    case.run(tmp_path)
    case.check_bits(tmp_path)


@KINDS
@pytest.mark.parametrize("layers", [LAYERS, ["linear"]])
def test_draws_projections(tmp_path: Path, kind: Any, layers: list[str]) -> None:
    """A and B of the size that the largest module asks for, which the file does not tell."""
    config = kind(r=5, target_modules=layers, projection_prng_key=7, save_projection=False)
    case = Case(config)
    case.run(tmp_path)
    case.check_bits(tmp_path)
    assert all("_lambda_" in n for n in load_file(tmp_path / "adapter/adapter_model.safetensors"))


@KINDS
def test_draws_projections_of_the_dtype_of_the_base(tmp_path: Path, kind: Any) -> None:
    """PEFT rounds A and B to bfloat16: another base dtype gives another adapter."""
    config = kind(r=5, target_modules=LAYERS, save_projection=False)
    case = Case(config, torch.bfloat16)
    case.merge(tmp_path)
    case.check_bits(tmp_path)


def test_trained_biases(tmp_path: Path) -> None:
    Case(VeraConfig(r=5, target_modules=LAYERS, bias="all")).run(tmp_path / "all")
    Case(VeraConfig(r=5, target_modules=LAYERS, bias="vera_only")).run(tmp_path / "only")


@KINDS
def test_refuses(tmp_path: Path, kind: Any) -> None:
    config = kind(r=5, target_modules=LAYERS)
    name = config.peft_type.value.lower()
    key = f"base_model.model.square.{name}_lambda_d"
    message = refusal(config, tmp_path / "missing", lambda t: t.pop(key))
    assert f"lacks {name}_lambda_d" in message
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(4)}))
    assert "module 'square'" in message
    assert f"{name}_lambda_d [4]" in message
    assert "has rank 5, and" in refusal(config, tmp_path / "rank", r=4)
    message = refusal(config, tmp_path / "half", lambda t: t.pop(f"base_model.{name}_B"))
    assert f"lacks {name}_B" in message
    small = {f"base_model.{name}_B": torch.ones(40, 5)}
    message = refusal(config, tmp_path / "small", lambda t: t.update(small))
    assert "wide.weight is [48, 36]" in message
    assert f"{name}_B [40, 5]" in message
    gone = [f"base_model.{name}_A", f"base_model.{name}_B"]
    message = refusal(config, tmp_path / "gone", lambda t: [t.pop(key) for key in gone])
    assert f"lacks {name}_A, {name}_B" in message


def test_refuses_samples(tmp_path: Path) -> None:
    config = PveraConfig(r=5, target_modules=LAYERS, sample_at_inference=True)
    assert "no merged weight" in refusal(config, tmp_path)
