"""torchtune's own adapters, by its formulas: W′ = to_hf(to_tune(W) + alpha / r · B @ A).

`to_tune` and `to_hf` are what torchtune 0.6.1 does to the rows of q and k when it reads and writes
Hugging Face's checkpoints. (Adapters that torchtune 0.6.1 itself made on these models gave the same
weights as its own merge, to 1e-7 in float32, and the same logits.)
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import DTYPES, Exact, config_of, load

from tests.oracle.foreign import added, base_of, check, normal, normed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.oracle.conftest import Lab

RANK, ALPHA = 4, 6
NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}


def to_tune(t: Tensor, heads: int) -> Tensor:
    return t.view(heads, 2, -1, t.shape[-1]).transpose(1, 2).reshape(t.shape)


def to_hf(t: Tensor, heads: int) -> Tensor:
    return t.view(heads, -1, 2, t.shape[-1]).transpose(1, 2).reshape(t.shape)


def their_name(name: str) -> str | None:
    module = name.removesuffix(".weight")
    if module == "lm_head":
        return "output"
    number, _, inside = module.removeprefix("model.layers.").partition(".")
    return f"layers.{number}.{NAMES[inside]}" if inside in NAMES else None


def adapt(base: Path, *, dora: bool) -> tuple[dict[str, Tensor], dict[str, Exact]]:
    config = config_of(base)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, Exact] = {}
    for seed, (name, W) in enumerate(load(base).items()):
        theirs = their_name(name)
        if theirs is None or not name.endswith(".weight"):
            continue
        A, B = normal(RANK, W.shape[1], seed=seed), normal(W.shape[0], RANK, seed=seed + 100)
        tensors |= {f"{theirs}.lora_a.weight": A, f"{theirs}.lora_b.weight": B}
        count = heads.get(theirs.rpartition(".")[2]) if config["model_type"] == "llama" else None
        W = to_tune(W, count) if count else W
        value = added(W, B, A, ALPHA / RANK)
        if dora:
            m = W.float().norm(dim=1) * (1 + normal(W.shape[0], seed=seed + 200))
            tensors[f"{theirs}.magnitude"] = m
            value = normed(value, m)
        if count:
            value = Exact(to_hf(value.value, count), to_hf(value.slack, count))
        wanted[name] = value
    return tensors, wanted


def write(folder: Path, tensors: dict[str, Tensor], name: str = "adapter_model.pt") -> Path:
    folder.mkdir()
    torch.save(tensors, folder / name)
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_two_orders_are_inverse() -> None:
    W = normal(24, 5)
    assert torch.equal(to_hf(to_tune(W, 3), 3), W)
    assert not torch.equal(to_tune(W, 3), W)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_merges(lab: Lab, tmp_path: Path, model: str, dtype: str, kind: str) -> None:
    base = base_of(lab, model, dtype)
    tensors, wanted = adapt(base, dora=kind == "dora")
    assert len(wanted) == 15
    check(base, write(tmp_path / "adapter", tensors), tmp_path / "out", wanted)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_own_form_is_read_where_both_are(lab: Lab, tmp_path: Path, kind: str) -> None:
    """Torchtune's copy for PEFT: of DoRA it leaves magnitudes in torchtune's order."""
    base = base_of(lab, "llama", "float32")
    tensors, wanted = adapt(base, dora=kind == "dora")
    folder = write(tmp_path / "adapter", tensors)
    (folder / "adapter_model.safetensors").write_bytes(b"the copy")
    check(base, folder, tmp_path / "out", wanted)
