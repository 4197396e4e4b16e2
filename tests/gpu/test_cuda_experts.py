"""Fused experts on a GPU: many jobs, of several threads' streams, use one tensor in its memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

EXPERTS, HIDDEN, INNER, RANK, LAYERS = 16, 256, 96, 4, 4
PARTS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def make(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 10

    base, factors = {}, {}
    for layer in range(LAYERS):
        path = f"layers.{layer}.experts"
        for expert in range(EXPERTS):
            for part, shape in PARTS.items():
                base[f"{path}.{expert}.{part}.weight"] = values(*shape).bfloat16()
        for wrapped, rows, columns in ((".base_layer", 2 * INNER, HIDDEN), ("", HIDDEN, INNER)):
            key = f"base_model.model.{path}{wrapped}.lora_"
            factors[f"{key}A.weight"] = values(RANK * EXPERTS, columns)
            factors[f"{key}B.weight"] = values(rows, RANK * EXPERTS)
    (folder / "adapter").mkdir()
    save_file(base, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_parameters": targets}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def test_same_as_on_the_cpu(tmp_path: Path) -> None:
    make(tmp_path)
    results = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        weft.merge(tmp_path, tmp_path / "adapter", output=out, device=device, threads=4)
        results.append(load_file(out / "model.safetensors"))
    one, other = results
    base = load_file(tmp_path / "model.safetensors")
    for name, value in one.items():
        assert (value != base[name]).float().mean() > 0.5
        assert (value != other[name]).float().mean() <= 1e-3
