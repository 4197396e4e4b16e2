"""What vLLM refuses of an adapter, told from its files alone: the rules of its loader, in short."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

# Keys that its parser of names takes; anything else is an error.
_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


def refusals(adapter: Path, base: Path | None = None) -> list[str]:
    """Why it is refused, or parts of it left out; `base` tells layers that have no LoRA there."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = [
        why
        for why, holds in (
            ("modules_to_save", config["modules_to_save"]),
            ("bias", config["bias"] != "none"),
            ("DoRA", config["use_dora"]),
            ("target_parameters", config["target_parameters"]),
            ("patterns, which it does not read", config["rank_pattern"] or config["alpha_pattern"]),
        )
        if holds
    ]
    factors = {key: tensor for key, tensor in tensors.items() if key.endswith(_ENDS)}
    if factors.keys() != tensors.keys():
        found.append("keys that are no factors")
    ranks = {
        tensor.shape[0 if key.endswith(("A.weight", "embedding_A")) else 1]
        for key, tensor in factors.items()
    }
    if max(ranks, default=0) > 512:
        found.append("a rank above every max_lora_rank")
    if ranks != {config["r"]}:
        found.append("ranks other than r")
    if any(tensor.dim() != 2 for tensor in factors.values()):
        found.append("a convolution")
    if base and json.loads((base / "config.json").read_text()).get("model_type") == "gpt2":
        found.append("Conv1D")
    return found
