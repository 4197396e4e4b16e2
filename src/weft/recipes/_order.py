"""Documents that name each other, in the order in which they can run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.recipes._faults import Faults
    from weft.recipes._yaml import Document
    from weft.recipes.records import Recipe


def needs(recipe: Recipe, names: set[str]) -> set[str]:
    """The documents that `recipe` is made from."""
    return {model.path for model in recipe.models()} & names


def in_order(recipes: list[tuple[Recipe, Document]], faults: Faults) -> list[Recipe]:
    """What a recipe is made from comes before it; the one without a name comes last."""
    nameless = [document for recipe, document in recipes if recipe.name is None]
    for document in nameless[1:]:
        faults.add(
            document,
            (),
            "a second document without a name: only one of them can be the output",
            "give all but the last a `name:`",
        )
    by_name: dict[str, Recipe] = {}
    for recipe, document in recipes:
        if recipe.name is not None and recipe.name in by_name:
            faults.add(document, ("name",), f'a second document called "{recipe.name}"')
        elif recipe.name is not None:
            by_name[recipe.name] = recipe
    waiting = sorted(recipes, key=lambda each: each[0].name is None)
    ordered: list[Recipe] = []
    done: set[str] = set()
    while waiting:
        ready = [each for each in waiting if needs(each[0], set(by_name)) <= done]
        if not ready:
            _circle(waiting, set(by_name) - done, faults)
            break
        ordered.append(ready[0][0])
        done.add(ready[0][0].name or "")
        waiting.remove(ready[0])
    return ordered


def _circle(waiting: list[tuple[Recipe, Document]], open: set[str], faults: Faults) -> None:
    by_name = {recipe.name: recipe for recipe, _ in waiting}
    told: set[str] = set()
    for recipe, document in waiting:
        path: list[str] = []
        name = recipe.name
        while name is not None and name not in path:
            path.append(name)
            name = min(needs(by_name[name], open), default=None)
        if name is not None and name == recipe.name and name not in told:
            told.update(path)
            faults.add(
                document,
                ("name",),
                "documents that are made from each other: " + " ← ".join([*path, str(name)]),
                "if a folder of that name was meant, write ./" + str(name),
            )
