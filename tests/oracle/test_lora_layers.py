"""LoRA on what is no plain matrix: convolutions and nn.MultiheadAttention."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import weft
from tests.oracle.methods import Case, noise
from weft.core.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# A false alarm of PEFT's, which counts the bias among the factors.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. [0-9]+ LoRA tensor.*lora_B.bias")

DTYPES = [torch.float32, torch.bfloat16]


# ------------------------------------------------------------------------------------ convolutions


class Convolutions(nn.Module):
    """(batch, 6, 10) -> (batch, 5); `dilated` and `strided` are not what their `lora_A` is."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 12, 3, padding=1)
        self.strided = nn.Conv1d(12, 12, 4, stride=2, padding=1, bias=False)
        self.two = nn.Conv2d(3, 8, (3, 2), padding=(1, 0))
        self.point = nn.Conv2d(8, 6, 1)
        self.three = nn.Conv3d(2, 6, (1, 2, 2))
        self.head = nn.Linear(6 * 3 * 3 * 3, 5)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.strided(self.one(hidden).tanh()).tanh()  # (batch, 12, 5)
        hidden = self.two(hidden.reshape(-1, 3, 4, 5)).tanh()  # (batch, 8, 4, 4)
        hidden = self.point(hidden).tanh()  # (batch, 6, 4, 4)
        hidden = self.three(hidden.reshape(-1, 2, 3, 4, 4)).tanh()  # (batch, 6, 3, 3, 3)
        out: Tensor = self.head(hidden.flatten(1))
        return out


LAYERS = ["one", "strided", "two", "point", "three"]
PICTURES = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(7))


def convolutions(dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, **options)
    return Case(config, dtype, model=Convolutions, inputs=PICTURES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"two": 3}, "alpha_pattern": {"point": 5}},
        {"use_dora": True},
        {"bias": "all"},
    ],
    ids=["plain", "rank-stabilised", "dora", "bias"],
)
def test_convolutions(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    convolutions(dtype, **options).run(tmp_path)


def test_bias_of_lora_b(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["one", "two", "three"], lora_bias=True)
    Case(config, model=Convolutions, inputs=PICTURES).run(tmp_path)


def test_bits_of_peft(tmp_path: Path) -> None:
    """A kernel of one element is a matrix, and PEFT multiplies it as one."""
    case = convolutions()
    case.run(tmp_path)
    theirs = case.peft_merged(tmp_path)
    assert torch.equal(case.merged["point.weight"], theirs["point.weight"])


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, groups=2)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.conv(hidden)
        return out


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_groups_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["conv"])
    with pytest.raises(PlanError, match="a convolution of 2 groups") as error:
        Case(config, model=Grouped).run(tmp_path)
    assert "no merged weight does the same" in str(error.value.hint)


# -------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Its parameters are one for queries, keys and values, and one for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        out: Tensor = self.head(mixed)
        return out


WORDS = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(3))


def attention(tmp_path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Folders `base` and `adapter`; -> the trained model of PEFT."""
    torch.manual_seed(0)
    base = Attention().to(dtype)
    with torch.no_grad():
        base.attention.in_proj_bias.normal_()
        base.attention.out_proj.bias.normal_()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["attention"], **options)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    noise(model)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval()


def factors(folder: Path, module: str) -> tuple[Tensor, Tensor]:
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{module}.lora_{n}.weight"].double() for n in "AB")
    return A, B


def reference(folder: Path, hidden: Tensor) -> Tensor:
    """Base and adapter side by side, in float64: W x + s · B (A x) for each projection."""
    base = {n: v.double() for n, v in load_file(folder / "base" / "model.safetensors").items()}

    def project(module: str, weight: str, bias: str, x: Tensor) -> Tensor:
        A, B = factors(folder, module)
        return x @ base[weight].T + base[bias] + 1.5 * (x @ A.T) @ B.T

    x = hidden.double()
    qkv = project("attention", "attention.in_proj_weight", "attention.in_proj_bias", x)
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in qkv.chunk(3, -1))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    mixed = project(
        "attention.base_layer.out_proj",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
        mixed,
    )
    return mixed @ base["head.weight"].T + base["head.bias"]


def test_attention_once(tmp_path: Path) -> None:
    """What LoRA says; what Weft writes; and what PEFT makes of the output projection: twice ΔW."""
    model = attention(tmp_path)
    weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    plain = Attention().eval()
    plain.load_state_dict(merged)
    want = reference(tmp_path, WORDS)
    with torch.no_grad():
        after = plain(WORDS).double()
        unmerged = model(WORDS).double()
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-5)
    theirs = model.merge_and_unload().state_dict()
    assert torch.equal(merged["attention.in_proj_weight"], theirs["attention.in_proj_weight"])
    A, B = factors(tmp_path, "attention.base_layer.out_proj")
    delta = 1.5 * B @ A
    ours, peft_delta = (
        w["attention.out_proj.weight"].double() - base["attention.out_proj.weight"].double()
        for w in (merged, theirs)
    )
    torch.testing.assert_close(ours, delta, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(peft_delta, 2 * delta, rtol=1e-4, atol=1e-6)
    assert (unmerged - want).abs().max() > 1e-2, "PEFT's forward pass is that of LoRA now"


def test_attention_says_so(tmp_path: Path) -> None:
    attention(tmp_path)
    made = weft.plan_merge(tmp_path / "base", tmp_path / "adapter")
    (note,) = [note for note in made.plan.notes if "out_proj" in note]
    assert "twice" in note
    # Its output is named with it: nothing is said to be adapted unasked.
    assert not any("does not name" in warning for warning in made.warnings)


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_biases_of_attention(tmp_path: Path, which: str) -> None:
    model = attention(tmp_path, bias=which)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("bias") for name in saved)
    weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    theirs = model.merge_and_unload().state_dict()
    biases = [name for name in merged if name.endswith("bias")]
    assert [name for name in biases if not torch.equal(merged[name], theirs[name])] == []


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_bias_of_lora_b_in_attention(tmp_path: Path) -> None:
    attention(tmp_path, lora_bias=True)
    with pytest.raises(PlanError, match="which PEFT trains and uses nowhere"):
        weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "merged")


def test_two_modules_of_a_name_inside(tmp_path: Path) -> None:
    """`base_layer.out_proj` without its attention is no layer that PEFT writes."""
    attention(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {n: v for n, v in load_file(file).items() if "out_proj" in n}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PlanError, match="wraps a layer twice"):
        weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "merged")
