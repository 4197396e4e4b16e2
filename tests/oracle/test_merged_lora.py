"""PEFT 0.1 and 0.2's MergedLinear, by its forward pass in float64.

(PEFT 0.2.0 itself, trained on GPT-2 and GPT-NeoX: the merged model gives its logits to 4e-7, and so
do plain adapters of 0.3 to 0.6. Its own merge of MergedLinear stops with an error.)
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import DTYPES, Exact, gamma, load
from safetensors.torch import save_file
from torch import nn

from tests.oracle.foreign import base_of, check, normal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from tests.oracle.conftest import Lab

RANK, ALPHA = 4, 6


class MergedLinear(nn.Module):
    """What remains of PEFT 0.2.0's class without a base weight, dropout and merging."""

    def __init__(self, inputs: int, outputs: int, enable_lora: Sequence[bool], groups: int) -> None:
        super().__init__()
        parts = sum(enable_lora)
        length = outputs // len(enable_lora)
        self.outputs = outputs
        self.lora_A = nn.Linear(inputs, RANK * parts, bias=False)
        self.lora_B = nn.Conv1d(RANK * parts, length * parts, 1, groups=groups, bias=False)
        self.lora_ind = torch.zeros(len(enable_lora), length, dtype=torch.bool)
        self.lora_ind[list(enable_lora)] = True
        self.lora_ind = self.lora_ind.view(-1)

    def forward(self, x: Tensor) -> Tensor:
        after_A = self.lora_A(x)
        after_B = self.lora_B(after_A.transpose(-2, -1)).transpose(-2, -1)
        result = x.new_zeros(*x.shape[:-1], self.outputs)
        result[..., self.lora_ind] = after_B
        return result * (ALPHA / RANK)


def train(
    inputs: int, outputs: int, enable_lora: Sequence[bool], groups: int, seed: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The file's tensors, and ΔW (out, in) with the same of absolute values."""
    layer = MergedLinear(inputs, outputs, enable_lora, groups)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 * seed + number))
        saved = {name: value.clone() for name, value in layer.state_dict().items()}
        eye = torch.eye(inputs, dtype=torch.float64)
        delta = layer.double()(eye[None])[0].T
        for parameter in layer.parameters():
            parameter.abs_()
        size = layer(eye[None])[0].T
    return saved, delta, size


def write(folder: Path, tensors: dict[str, Tensor], enable_lora: Sequence[bool]) -> Path:
    folder.mkdir()
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    torch.save(named, folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "merge_weights": False}
    config |= {"enable_lora": list(enable_lora), "fan_in_fan_out": True, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def wanted_of(W: Tensor, delta: Tensor, size: Tensor) -> Exact:
    return Exact(W.double() + delta, gamma(3 * RANK + 3) * size + gamma(3) * delta.abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_conv1d(lab: Lab, tmp_path: Path, dtype: str) -> None:
    """GPT-2's c_attn, with queries and values, as PEFT took them by itself."""
    base = base_of(lab, "gpt2", dtype)
    enable_lora = (True, False, True)
    tensors, wanted = {}, {}
    for n in range(2):
        module = f"transformer.h.{n}.attn.c_attn"
        W = load(base)[f"{module}.weight"]
        saved, delta, size = train(*W.shape, enable_lora, 2, n)
        tensors |= {f"{module}.{name}": value for name, value in saved.items()}
        wanted[f"{module}.weight"] = wanted_of(W, delta.T, size.T)
    check(base, write(tmp_path / "adapter", tensors, enable_lora), tmp_path / "out", wanted)


@pytest.mark.parametrize("axes", [(), (1,)], ids=["matrix", "convolution"])
@pytest.mark.parametrize(
    ("enable_lora", "groups"),
    [
        ((True, False, True), 2),
        ((False, True, True), 2),
        ((True, True, True), 3),
        ((True, False, False, True), 2),
        ((False, True), 1),
        ((True, True, True, True), 2),
    ],
)
def test_fused_linear(
    tmp_path: Path, enable_lora: tuple[bool, ...], groups: int, axes: tuple[int, ...]
) -> None:
    """Rows (out, in), any parts; a B whose convolution's axis was squeezed away, too."""
    (tmp_path / "base").mkdir()
    W = normal(24, 20)
    save_file({"layers.0.qkv.weight": W, "other": W + 1}, tmp_path / "base/model.safetensors")
    saved, delta, size = train(20, 24, enable_lora, groups, 1)
    saved["lora_B.weight"] = saved["lora_B.weight"].view(*saved["lora_B.weight"].shape[:2], *axes)
    adapter = write(
        tmp_path / "adapter", {f"layers.0.qkv.{k}": v for k, v in saved.items()}, enable_lora
    )
    wanted = {"layers.0.qkv.weight": wanted_of(W, delta, size)}
    check(tmp_path / "base", adapter, tmp_path / "out", wanted)
