"""`path[@revision][+adapter[@revision][:weight]]…`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from weft.recipes.records import ModelName

if TYPE_CHECKING:
    from weft.recipes import schema

_WEIGHT = re.compile(r"(.+):(-?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?)$")


class NoName(ValueError):
    """The text names no model; says why, and what to write."""


def parse(text: str) -> ModelName:
    """The model that `text` names."""
    first, *rest = text.split("+")
    path, revision = _revised(first, text)
    adapters = []
    for part in rest:
        weighted = _WEIGHT.match(part)
        part, weight = (weighted[1], float(weighted[2])) if weighted else (part, 1.0)
        adapters.append((*_revised(part, text), weight))
    return ModelName(path, revision, tuple(adapters))


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
