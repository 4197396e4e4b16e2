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
# All that torchtune writes into the config of its copy in PEFT's form, where PEFT writes dozens.
TORCHTUNE_CONFIG = {"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"}
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
    """The adapters in torchtune's own form that `path` is or holds, by epoch.

    A folder that PEFT wrote holds none, whatever a `.pt` that strayed into it is called.
    """
    if path.name == CONFIG:
        path = path.parent
    if path.is_file():
        return [path] if _OF_TORCHTUNE.fullmatch(path.name) else []
    return [] if not path.is_dir() or _written_by_peft(path) else _called_so(path)


def strays(folder: Path) -> list[str]:
    """What a note says of files in a folder of PEFT that are called as torchtune's."""
    return [
        f"{file.name} is called as an adapter of torchtune and is not read: PEFT wrote this folder"
        for file in _called_so(folder)
        if _written_by_peft(folder)
    ]


def _called_so(folder: Path) -> list[Path]:
    found = [file for file in folder.iterdir() if _OF_TORCHTUNE.fullmatch(file.name)]
    return sorted(found, key=lambda file: (len(file.name), file.name))


def _written_by_peft(folder: Path) -> bool:
    if not any((folder / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        return False
    try:
        return not read_json(folder / CONFIG).keys() <= TORCHTUNE_CONFIG
    except WeftError:
        return False
