"""What PEFT before 0.7 wrote: `.bin`, and LoRA on parts of fused matrices (`enable_lora`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import weft
from weft.cli.show import inspection_as_text
from weft.core.errors import FormatError, PlanError
from weft.formats.adapters import open_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.conftest import Folders
    from weft.core.specs import Adapter

QKV = "transformer.h.0.attn.c_attn"
PREFIX = "base_model.model."
# As PEFT 0.2.0 saved it.
CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "gpt2",
    "bias": "none",
    "enable_lora": [True, False, True],
    "fan_in_fan_out": True,
    "inference_mode": True,
    "lora_alpha": 12,
    "lora_dropout": 0.0,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 2,
    "target_modules": ["c_attn"],
    "task_type": "CAUSAL_LM",
}


def factors(a: tuple[int, ...] = (4, 8), b: tuple[int, ...] = (16, 2, 1)) -> dict[str, Tensor]:
    return {f"{QKV}.lora_A.weight": torch.ones(a), f"{QKV}.lora_B.weight": torch.ones(b)}


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({PREFIX + k: v for k, v in tensors.items()}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def read(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Adapter:
    return open_adapter(write(folder, tensors or factors(), **config), "the/adapter")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


def test_what_is_read(folder: Path) -> None:
    adapter = read(folder, factors() | {f"{QKV}.bias": torch.ones(24)}, bias="lora_only")
    first, second = adapter.entries
    assert (first.kind, first.scaling, first.params) == ("merged_lora", 6, (("parts", (1, 0, 1)),))
    assert (second.target, second.kind) == (f"{QKV}.bias", "replace")
    assert adapter.notes == ()
    assert "rank 2, alpha 12, scaling 6" in inspection_as_text(adapter)


@pytest.mark.parametrize("flags", [None, []])
def test_plain_lora_of_those_releases(folder: Path, flags: Any) -> None:
    adapter = read(folder, factors((2, 8), (24, 2)), enable_lora=flags)
    assert adapter.entries[0].kind == "lora"
    assert adapter.notes == ()


def test_base_that_does_not_fit(folder: Path, folders: Folders) -> None:
    write(folder, factors())
    for shape in ((24, 8), (8, 24)):
        base = folders.base([], {f"{QKV}.weight": torch.ones(shape)}, name=str(shape[0]))
        assert weft.plan_merge(base, folder).plan.jobs[0].operation == "merged_lora"
    base = folders.base([], {f"{QKV}.weight": torch.ones(16, 8)}, name="other")
    with pytest.raises(PlanError, match=r"is \[16, 8\] in the base, and .* do not fit it"):
        weft.plan_merge(base, folder)


@pytest.mark.parametrize(
    "tensors",
    [
        factors((3, 8)),
        factors(b=(15, 2, 1)),
        factors(b=(16, 3, 1)),
        factors(b=(16, 2, 3)),
        factors(b=(16,)),
        factors((4,)),
        factors((6, 8), (16, 1, 1)),
    ],
)
def test_factors_that_do_not_fit(folder: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(PlanError) as error:
        read(folder, tensors)
    (problem,) = error.value.problems
    assert "are not the factors of 2 parts that adapter_config.json says" in problem.what
    assert str(folder / "adapter_model.bin") in problem.what


def test_rank_of_another_config(folder: Path) -> None:
    with pytest.raises(PlanError, match=r"has rank 2, and adapter_config\.json says r = 4"):
        read(folder, r=4)


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_half_of_it(folder: Path, missing: str) -> None:
    tensors = {key: value for key, value in factors().items() if missing not in key}
    with pytest.raises(PlanError, match="that is a lora_A and a lora_B"):
        read(folder, tensors)
    with pytest.raises(PlanError, match="of one part at least"):
        read(folder, enable_lora=[False, False, False])


@pytest.mark.parametrize("flags", [True, "true", [1, 0, 1], [None], {"a": True}])
def test_flags_of_another_type(folder: Path, flags: Any) -> None:
    with pytest.raises(FormatError, match=r"enable_lora = .* must be a list of true and false"):
        read(folder, enable_lora=flags)
