"""Small checkpoints and adapters written by hand, and recipes run on them."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

import weft

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

HIDDEN = 48
VOCABULARY = 40
MATRIX = "model.layers.{}.self_attn.q_proj"


def random(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    """Normal float32 values of the standard deviation `size`."""
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llama(
    seed: int | None = None, *, layers: int = 2, dtype: str = "bfloat16"
) -> dict[str, Tensor]:
    """The tensors of a base (seed None), or of a fine-tune of it; weights of std 0.02."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for n in range(layers):
        shapes[f"{MATRIX.format(n)}.weight"] = (HIDDEN, HIDDEN)
        shapes[f"model.layers.{n}.input_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        values = random(*shape, seed=number, size=0.02)
        if seed is not None:
            values += random(*shape, seed=1000 * seed + number, size=0.004)
        found[name] = values.to(getattr(torch, dtype))
    return found


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "tie_word_embeddings": False,
}


def checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> Path:
    """A folder with one file of weights; CONFIG is its config, with `config` added."""
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    told = CONFIG | {"num_hidden_layers": len(layers)} | dict(config or {})
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def lora(
    folder: Path, seed: int, *, rms: float, layers: int = 2, base: str | None = None
) -> dict[str, Tensor]:
    """An adapter of rank 4 on every q_proj; what it adds to each weight, in float64.

    Args:
        folder: Where it goes.
        seed: Of its values.
        rms: Of what it adds.
        layers: Of the base.
        base: What its config says that it was trained on.
    """
    factors, deltas = {}, {}
    scaling = 6 / 4
    for n in range(layers):
        A = random(4, HIDDEN, seed=100 * seed + n)
        B = random(HIDDEN, 4, seed=100 * seed + n + 50)
        size = float((scaling * B.double() @ A.double()).square().mean().sqrt())
        B *= rms / size
        factors[f"base_model.model.{MATRIX.format(n)}.lora_A.weight"] = A
        factors[f"base_model.model.{MATRIX.format(n)}.lora_B.weight"] = B
        deltas[f"{MATRIX.format(n)}.weight"] = scaling * B.double() @ A.double()
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    config |= {"base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def run(root: Path, text: str, out: str = "out", **options: Any) -> dict[str, Tensor]:
    """Run the recipe `text`, whose paths start in `root`; the tensors of the output."""
    (root / "recipe.yml").write_text(textwrap.dedent(text))
    weft.run(root / "recipe.yml", output=root / out, **options)
    return load(root / out)


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
