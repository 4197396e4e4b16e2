"""Extractions that MergeKit is given as `base+ADAPTER`: name -> the models, and Weft's options."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load_file

if TYPE_CHECKING:
    from pathlib import Path

CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "untied": ("llama-base", "llama-a", ("--rank", "8")),
    "untied, ranks that differ": ("llama-base", "llama-b", ("--energy", "0.6")),
    "untied, one rank": ("llama-base", "llama-a", ("--rank", "4", "--uniform-rank")),
    "tied": ("llama-tied-base", "llama-tied-a", ("--rank", "8")),
    "tied, saved": ("gemma2-base", "gemma2-a", ("--rank", "6", "--embed", "save")),
    "biases": ("qwen2-base", "qwen2-a", ("--rank", "8")),
    "one layer left out": (
        "llama-base",
        "llama-c",
        ("--rank", "8", "--exclude", "layers.1.self_attn, layers.0.input_layernorm"),
    ),
}

# In the config: what depends on where the base lies, or on the last digits of an energy.
_OPEN = ("base_model_name_or_path", "rank_pattern", "alpha_pattern", "r", "lora_alpha")


def form_of(adapter: Path) -> dict[str, Any]:
    """What MergeKit goes by when it loads an adapter: the keys of its tensors, and its config."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        "keys": sorted(tensors),
        "config": {key: value for key, value in sorted(config.items()) if key not in _OPEN},
    }
