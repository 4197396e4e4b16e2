"""Adapters of single experts that PEFT fused for transformers 5, and saved so.

It puts the A of gate and up projection over each other and their B along a diagonal, and doubles
rank and alpha. That leaves alpha / r as it was, and makes alpha / √r √2 too large.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from weft.formats.checkpoint import bits

if TYPE_CHECKING:
    from weft.core.specs import Adapter, AdapterEntry, TensorRef

_PATTERN = r".*\.gate_up_proj"


def unconverted(entry: AdapterEntry, adapter: Adapter, *, grouped: bool) -> AdapterEntry:
    """The entry, with the scaling that it had when it was trained."""
    config = adapter.config
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    doubled = (
        config.get("use_rslora")
        and entry.parameter == "gate_up_proj"
        and ranks.get(_PATTERN) == 2 * config["r"]
        and alphas.get(_PATTERN) == 2 * config["lora_alpha"]
    )
    B = dict(entry.tensors)["B"]
    experts = dict(entry.params)["experts"]
    assert isinstance(experts, int)
    if not doubled or grouped or not _block_diagonal(B, experts):
        return entry
    return replace(entry, scaling=entry.scaling / math.sqrt(2))


def _block_diagonal(B: TensorRef, experts: int) -> bool:
    """B (2I, 2r · E), rank-major: gate rows have only the first ranks, up rows only the others.

    Training fills the zeros: then it went on after the conversion, with PEFT's scaling.
    """
    used = (bits(B) << 1) != 0  # without the sign: minus zero is zero
    half = B.shape[0] // 2
    used = used.reshape(B.shape[0], -1, experts)
    rank = used.shape[1] // 2
    return not used[:half, rank:].any() and not used[half:, :rank].any() and bool(used.any())
