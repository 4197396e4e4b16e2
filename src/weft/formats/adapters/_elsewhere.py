"""Where the adapter is, if not in the folder that was given: what trainers leave, and how."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from weft.core.errors import NotFound
from weft.formats.adapters._peft_config import CONFIG
from weft.formats.checkpoint import LOST_CONFIG

if TYPE_CHECKING:
    from pathlib import Path

# A run's folder, a step's folder inside it, and the adapter's, by callbacks, by name, by part.
_DEPTH = 3
_GATHER_FSDP = (
    "gather them (accelerate merge-weights, or a save with FULL_STATE_DICT), and put the adapter's "
    f"tensors with its {CONFIG} into a folder"
)
_GATHER_DEEPSPEED = (
    "gather them (python zero_to_fp32.py --exclude_frozen_parameters), and put what comes out as "
    f"adapter_model.bin beside the {CONFIG} of the training"
)
_CONVERT_MLX = f"load and save it with mlx, as adapters.safetensors beside an {CONFIG}"
# Files that are no adapter, what they are, and what makes one of them.
_SHARDS = (
    ("pytorch_model_fsdp_*/*.distcp", "shards that FSDP saved apart", _GATHER_FSDP),
    ("global_step*/*_states.pt", "shards that DeepSpeed saved apart", _GATHER_DEEPSPEED),
    ("adapters.npz", "an adapter of mlx-lm before 0.9, without its scaling", _CONVERT_MLX),
)


def not_here(path: Path) -> NotFound:
    """What to say of a folder without an adapter of its own."""
    if inside := adapters_inside(path):
        some = ", ".join(inside[:3]) + (f" … {inside[-1]}" if len(inside) > 3 else "")
        return NotFound(
            f"no adapter in {path}: it has no {CONFIG}, and the folders {some} inside it have",
            f"give the one that is meant, such as {path / inside[-1]}",
        )
    for pattern, what, hint in _SHARDS:
        if next(path.glob(pattern), None):
            return NotFound(f"no adapter in {path}: it has {what}, and no {CONFIG}", hint)
    if weights := sorted(file.name for file in path.glob("adapter_model.*")):
        what = f"{path} has {', '.join(weights)} and no {CONFIG}, which says how to scale it"
        return NotFound(what, LOST_CONFIG)
    return NotFound(
        f"no adapter in {path}: it has no {CONFIG}",
        "give the folder that PEFT's save_pretrained wrote",
    )


def shards_beside(folder: Path) -> str | None:
    """How to get the weights that a save left in shards beside an adapter without them."""
    found = (hint for pattern, _, hint in _SHARDS if next(folder.glob(pattern), None))
    return next(found, None)


def adapters_inside(path: Path) -> list[str]:
    """Folders below `path` with an adapter, by step."""
    depths = ("*/" * n + CONFIG for n in range(1, _DEPTH + 1))
    found = {str(file.parent.relative_to(path)) for depth in depths for file in path.glob(depth)}
    return sorted(found, key=_by_number)


def _by_number(name: str) -> list[tuple[int, str]]:
    """`checkpoint-900` before `checkpoint-1000`."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]
