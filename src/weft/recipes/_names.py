"""`path[@revision][+adapter[@revision][:weight]]…`."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from weft.recipes.records import ModelName

if TYPE_CHECKING:
    from weft.recipes import schema

_WEIGHTED = re.compile(r"(.+):([^:/\\]*)$")  # no `C:\folder`
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?$")


class NoName(ValueError):
    """The text names no model; says why, and what to write."""


def parse(text: str) -> ModelName:
    """The model that `text` names."""
    first, *rest = text.split("+")
    path, revision = _revised(first, text)
    adapters = []
    for part in rest:
        part, weight = _weighted(part, first, text)
        adapters.append((*_revised(part, text), weight))
    return ModelName(path, revision, tuple(adapters))


def _weighted(part: str, base: str, whole: str) -> tuple[str, float]:
    """`adapter:0.7` -> the adapter and its weight."""
    found = _WEIGHTED.match(part)
    if found is None:
        return part, 1.0
    adapter, weight = found.groups()
    if not _NUMBER.match(weight) or not math.isfinite(float(weight)):
        raise NoName(
            f'"{whole}" gives {adapter} the weight "{weight}", which is no number',
            f"write +{adapter}:0.5; if the colon belongs to the path, write\n"
            f"model:\n  model: {base}\n  lora: {{path: '{part}'}}",
        )
    return adapter, float(weight)


def model(found: str | schema.ModelMapping) -> ModelName:
    """The model that a recipe names by text or by a mapping."""
    if isinstance(found, str):
        return parse(found)
    path, revision = _mapped(found.model)
    listed = found.lora if isinstance(found.lora, list) else [found.lora]
    adapters = tuple(
        (*_mapped(each), 1.0 if isinstance(each, str) else each.weight)
        for each in listed
        if each is not None
    )
    return ModelName(path, revision, adapters, found.override_architecture)


def _mapped(found: str | schema.PathMapping) -> tuple[str, str | None]:
    if isinstance(found, str):
        return _revised(found, found)
    return _path(found.path), found.revision


def _revised(part: str, whole: str) -> tuple[str, str | None]:
    if part.count("@") > 1:
        raise NoName(
            f'"{whole}" has more than one @ in "{part}"',
            f"if it belongs to the path, write\nmodel:\n  model: {{path: '{part}'}}",
        )
    path, at, revision = part.partition("@")
    if not path.strip() or (at and not revision):
        missing = "a revision after the @" if path.strip() else "a path"
        raise NoName(
            f'"{whole}" lacks {missing}',
            "write `path@revision+adapter@revision:weight`; all but the path may be left out",
        )
    return _path(path), revision or None


def _path(path: str) -> str:
    return path.rstrip("/") or path[:1]
