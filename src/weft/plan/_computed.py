"""Buffers that a model computes by itself, and that old releases of transformers saved."""

from __future__ import annotations

import re

# Buffers that models compute, and that checkpoints held in the days of transformers 4.30.
_COMPUTED = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.position_ids$|\.masked_bias$|"
    r"(^|\.)h\.\d+\.attn\.bias$"
)


def is_computed(name: str) -> bool:
    """Whether the tensor of this name is no weight, and is made when the model is loaded."""
    return bool(_COMPUTED.search(name))
