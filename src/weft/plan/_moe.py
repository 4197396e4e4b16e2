"""Mixtures of experts: what transformers calls their tensors, in memory and on disk.

In memory, transformers 5 has the experts of a layer in two parameters, `gate_up_proj` (E, 2I, H)
and `down_proj` (E, H, I), or transposed. On disk most checkpoints have `experts.N.gate_proj`,
`up_proj` and `down_proj` (or `w1`, `w3`, `w2`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from weft.core.names import match

if TYPE_CHECKING:
    from weft.core.specs import Checkpoint

# Fused parameter -> what its parts are called where each expert has its own, in order.
PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
    "up_proj": (("up_proj",),),  # of experts without a gate
}
# Part -> (fused parameter, which part of it)
FUSED = {
    name: (fused, n)
    for fused in ("gate_up_proj", "down_proj")
    for names in PARTS[fused]
    for n, name in enumerate(names)
}
ONE_EXPERT = re.compile(rf"^(.*)\.(0|[1-9][0-9]*)\.({'|'.join(FUSED)})$")
# Segments of module paths that transformers 5 renamed in memory, and not on disk.
RENAMED = (("mlp", "block_sparse_moe"),)
# The release of PEFT whose form weft writes: by it a square weight of fused experts is read.
PEFT_RELEASE = "0.21.2"
# What has W (E, in, out), says `is_transposed` in transformers 5; and gate and up interleaved.
TRANSPOSED = {"gpt_oss", "aria", "aria_text", "openai_privacy_filter"}
# What is (E, out, in) in memory, and (E, in, out) on disk.
TURNED_ON_DISK = {"qwen3_vl_moe", "ernie4_5_vl_moe"}
INTERLEAVED = {"gpt_oss", "openai_privacy_filter"}


class Base:
    """The base's names, looked up by module."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.config = base.config
        self.modules: dict[str, list[str]] = defaultdict(list)  # -> what is directly in it
        for name in base.tensors:
            parts = name.split(".")
            for n in range(1, len(parts)):
                inside = self.modules[".".join(parts[:n])]
                if not inside or inside[-1] != parts[n]:
                    inside.append(parts[n])
        self._found: dict[str, str | None] = {}

    def module(self, name: str) -> str | None:
        """The module called `name` in the adapter's model."""
        if name not in self._found:
            self._found[name] = match([name], self.modules).names.get(name)
        return self._found[name]

    def model_types(self) -> set[str]:
        parts = [self.config, *(p for p in self.config.values() if isinstance(p, dict))]
        return {str(part["model_type"]) for part in parts if part.get("model_type")}
