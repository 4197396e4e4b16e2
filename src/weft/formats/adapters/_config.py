"""`adapter_config.json`: the one name that several tools give to configs of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import WeftError
from weft.formats.adapters._peft_config import CONFIG
from weft.formats.checkpoint import read_json

if TYPE_CHECKING:
    from pathlib import Path

# mlx-lm writes the second always, and instead of the first the third from 0.19 on.
_OF_MLX = {"lora_layers", "lora_parameters", "fine_tune_type"}


def written_by_mlx(folder: Path) -> bool:
    """Whether the config in `folder` is mlx-lm's; a broken one is PEFT's, which says what it is."""
    try:
        config = read_json(folder / CONFIG)
    except WeftError:
        return False
    return "peft_type" not in config and not _OF_MLX.isdisjoint(config)
