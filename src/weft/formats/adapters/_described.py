"""What an adapter is that no format reads to its end: as far as its config and header say it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import PlanError, Unsupported, WeftError, as_problems
from weft.core.specs import Adapter
from weft.core.units import clean
from weft.formats.adapters._peft_config import CONFIG
from weft.formats.checkpoint import read_header, read_json
from weft.formats.side_files import beside_adapter

if TYPE_CHECKING:
    from pathlib import Path

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
_NAMES = ("peft_type", "fine_tune_type")
_BASES = ("base_model_name_or_path", "model")


def described(path: Path, given: str, error: WeftError) -> Adapter | None:
    """The adapter in `path`, without entries, and `error` as the reason why; None if it is broken.

    Args:
        path: As it was found.
        given: As the user wrote it.
        error: Why it was not read.
    """
    if not isinstance(error, (Unsupported, PlanError)):
        return None  # not even a file of its format
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    named = path.is_file() and path.name != CONFIG
    files = [path] if named else [file for n in _WEIGHTS if (file := folder / n).is_file()]
    try:
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        header = read_header(files[0])
    except (WeftError, IndexError):
        return None
    kept, left = beside_adapter(folder)
    return Adapter(
        given=given,
        folder=str(folder),
        sources=(header.source,),
        kind=(_text(config, *_NAMES) or "of a kind that is not named").upper(),
        entries=(),
        tensors={ref.name: ref for ref in header.tensors},
        config=config,
        base_model=_text(config, *_BASES),
        revision=_text(config, "revision"),
        notes=(),
        side_files=tuple(kept),
        left_out=tuple(left),
        obstacles=as_problems(error),
    )


def _text(config: dict[str, Any], *fields: str) -> str | None:
    found = (config.get(field) for field in fields)
    return next((clean(value) for value in found if isinstance(value, str) and value), None)
