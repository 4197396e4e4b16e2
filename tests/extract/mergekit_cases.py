"""Extractions that MergeKit is given as `base+ADAPTER`: name -> the models, and Weft's options."""

from __future__ import annotations

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
