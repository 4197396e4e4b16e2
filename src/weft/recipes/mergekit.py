"""MergeKit's YAML, read into records.

Everything that can be known from the file alone is checked here, and all of it is said at once:
unknown keys, wrong types, parameters that nobody reads, models that lack one, layers that do not
fit. Whether the models exist, and fit each other, the planner finds out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.recipes import _order, _others, _yaml
from weft.recipes._build import Builder
from weft.recipes._faults import Faults
from weft.recipes._form import form

if TYPE_CHECKING:
    from weft.recipes.records import Recipe


def read(text: str, name: str = "recipe") -> list[Recipe]:
    """The recipes in `text`, in the order in which they run.

    Args:
        text: YAML, of one document or several that name each other.
        name: Of the file, for messages.

    Raises:
        FormatError: It is no YAML.
        Unsupported: It is a recipe for another tool.
        RecipeError: Whatever else is wrong with it, all of it.
    """
    faults = Faults(name)
    documents = _yaml.load(text, name)
    for document in documents:
        _others.refuse(document.data, name)
    recipes = []
    for document in documents:
        for loc, what in document.mistakes:
            faults.add(document, loc, what)
        notes = _others.modernise(document)
        parsed, popped = form(document, faults)
        if parsed is not None:
            recipes.append((Builder(document, faults, parsed, popped, notes).build(), document))
    faults.check()
    ordered = _order.in_order(recipes, faults)
    faults.check()
    return ordered
