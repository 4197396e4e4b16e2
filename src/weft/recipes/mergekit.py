"""MergeKit's YAML, read into records.

Everything that can be known from the file alone is checked here, and all of it is said at once:
unknown keys, wrong types, parameters that nobody reads, models that lack one, layers that do not
fit. Whether the models exist, and fit each other, the planner finds out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.errors import RecipeError
from weft.recipes import _order, _others, _yaml
from weft.recipes._build import Builder
from weft.recipes._faults import Faults
from weft.recipes._form import form
from weft.recipes._rough import rough

if TYPE_CHECKING:
    from weft.core.errors import Problem
    from weft.recipes.records import Recipe


@dataclass(frozen=True, slots=True)
class Draft:
    """What a file says, and what is wrong with it.

    Attributes:
        recipes: In the order in which they run; with problems, as far as they were understood.
        problems: All of them.
        no_models: What stands where a model may, and is the name of a document, or none at all.
    """

    recipes: list[Recipe]
    problems: list[Problem]
    no_models: frozenset[str]


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
    found = draft(text, name)
    if found.problems:
        raise RecipeError(name, found.problems)
    return found.recipes


def draft(text: str, name: str = "recipe") -> Draft:
    """As `read`; what is wrong with recipes comes beside what could be understood of them.

    Raises:
        FormatError: It is no YAML.
        Unsupported: It is a recipe for another tool.
    """
    faults = Faults(name)
    documents = _yaml.load(text, name)
    for document in documents:
        _others.refuse(document.data, name)
    recipes = []
    no_models = set()
    for document in documents:
        for loc, what in document.mistakes:
            faults.add(document, loc, what)
        notes = _others.modernise(document)
        parsed, popped = form(document, faults)
        if isinstance(document.data, dict) and document.data.get("name"):
            no_models.add(str(document.data["name"]).rstrip("/"))
        if parsed is not None:
            builder = Builder(document, faults, parsed, popped, notes)
            recipes.append((builder.build(), document))
            no_models |= builder.no_names
        elif isinstance(document.data, dict):
            recipes.append((rough(document), document))
    ordered = [recipe for recipe, _ in recipes]
    if not faults.problems:
        ordered = _order.in_order(recipes, faults)
    return Draft(ordered, faults.problems, frozenset(no_models))
