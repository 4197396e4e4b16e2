"""The models that a document names, where nothing more of it could be understood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import WeftError
from weft.recipes import _names
from weft.recipes._yaml import place
from weft.recipes.records import Module, Recipe, Slice, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weft.recipes._yaml import Document, Loc
    from weft.recipes.records import ModelName

_KEYS = ("model", "base_model", "finetune")


def rough(document: Document, parse: Callable[[str], ModelName] = _names.parse) -> Recipe:
    """A recipe of all of them, of use only for looking whether they are there.

    Args:
        document: What was read.
        parse: Says which model a text names.
    """
    sources = []
    for loc, text in _texts(document.data, ()):
        try:
            sources.append(Source(parse(text), None, {}, place(loc)))
        except (_names.NoName, WeftError):
            continue  # told where names are read, and there is nothing to look for
    module = Module(None, (Slice(tuple(sources), None, {}, ""),), {}, "")
    positions = {place(loc): at for loc, at in document.positions.items()}
    return Recipe(None, "", (module,), None, {}, None, None, None, None, document.text, positions)


def _texts(data: Any, loc: Loc) -> Iterator[tuple[Loc, str]]:
    """Plain names of models, wherever one may stand."""
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in entries:
        at = (*loc, key)
        if key in _KEYS and isinstance(value, str):
            yield at, value
        elif isinstance(value, dict | list):
            yield from _texts(value, at)
