"""Whose an adapter's folder is, where `adapter_config.json` alone does not say it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from weft.core.errors import WeftError
from weft.formats.adapters._peft_config import CONFIG
from weft.formats.checkpoint import read_json

if TYPE_CHECKING:
    from pathlib import Path

# mlx-lm writes the second always, and instead of the first the third from 0.19 on.
_OF_MLX = {"lora_layers", "lora_parameters", "fine_tune_type"}
# torchtune's own form of an adapter, of the last epoch, or before 0.5 of any.
_OF_TORCHTUNE = re.compile(r"adapter_(model|\d+)\.pt")


def written_by_mlx(folder: Path) -> bool:
    """Whether the config in `folder` is mlx-lm's; a broken one is PEFT's, which says what it is."""
    try:
        config = read_json(folder / CONFIG)
    except WeftError:
        return False
    return "peft_type" not in config and not _OF_MLX.isdisjoint(config)


def torchtune_files(path: Path) -> list[Path]:
    """The adapters in torchtune's own form that `path` is or holds, by epoch."""
    if path.name == CONFIG:
        path = path.parent
    if path.is_file():
        return [path] if _OF_TORCHTUNE.fullmatch(path.name) else []
    if not path.is_dir():
        return []
    found = [file for file in path.iterdir() if _OF_TORCHTUNE.fullmatch(file.name)]
    return sorted(found, key=lambda file: (len(file.name), file.name))
