"""The parts of a model with layers of their own: a decoder, a vision tower, what joins them.

MergeKit's recipes name them; here they are found from the names of the tensors.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from weft.core.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from weft.plan._views import View
    from weft.recipes.records import ModelName, Module, Recipe

# What MergeKit calls a module -> what the part's path holds; the first that does is meant.
_CALLED = {
    "text_decoder": ("language_model", "text_model", "model.layers", "decoder"),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "vision_model": ("vision_model", "vision_tower", "visual"),
    "multi_modal_projector": ("multi_modal_projector", "merger", "connector", "mm_projector"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "shared": ("shared",),
}
_HEADS = ("lm_head", "output", "embed_out", "score", "classifier", "proj_out")


def parts(view: View) -> dict[str, list[str]]:
    """The modules of a model: path -> its tensors, every tensor in one."""
    paths = [stack.path for stack in view.stacks]
    common = _common([path.split(".") for path in paths]) if len(paths) > 1 else []
    roots = {path: ".".join(path.split(".")[: len(common) + 1]) for path in paths}
    text = _text(view)
    found: dict[str, list[str]] = {}
    for name in view.tensors:
        words = name.split(".")
        root = next((r for r in roots.values() if name.startswith(r + ".")), None)
        if root and "merger" in words[len(root.split(".")) :][:1]:
            root = f"{root}.merger"  # Qwen-VL keeps what joins the two inside the tower
        if root is None and (words[0] in _HEADS or (text == words[: len(text)] and text)):
            root = next((r for r in roots.values() if r.split(".")[: len(text)] == text), None)
        found.setdefault(root or ".".join(words[: len(common) + 1]), []).append(name)
    return found


def _text(view: View) -> list[str]:
    """The root of the part that makes text, which the heads belong to."""
    for words in ("language_model", "text_model", "decoder", "model"):
        for stack in view.stacks:
            if words in stack.path.split("."):
                at = stack.path.split(".").index(words)
                return stack.path.split(".")[: at + 1]
    return []


def modules_of(
    recipe: Recipe, donor: View, views: Mapping[ModelName, View], problems: list[Problem]
) -> Iterator[tuple[Module, Callable[[str], bool]]]:
    """The modules of the recipe, each with what tells its tensors."""
    if [module.name for module in recipe.modules] == [None]:
        yield recipe.modules[0], lambda _name: True
        return
    known = parts(donor)
    for view in views.values():  # what the donor lacks belongs somewhere, too
        for where, names in parts(view).items():
            own = known.setdefault(where, [])
            own += sorted(set(names) - set(own))
    taken: dict[str, str] = {}
    for module in recipe.modules:
        name = module.name or ""
        path = _find(name, [path for path in known if path not in taken])
        if path is None:
            problems.append(
                Problem(
                    f"{donor.name} has no module {name!r}  @ {module.where}",
                    f"it has {', '.join(known)}",
                )
            )
            continue
        taken[path] = name
        yield module, _membership(known, path)
    problems += [
        Problem(
            f"the recipe says nothing of the module {path} of {donor.name}, whose {len(names)} "
            "tensors would be missing from the output  @ modules",
            "add it under `modules:`, with the models that it is to be made from:\n"
            f"  {path.rpartition('.')[2]}:\n    models:\n      - model: {donor.name}",
        )
        for path, names in known.items()
        if path not in taken
    ]


def _common(paths: list[list[str]]) -> list[str]:
    """What all begin with."""
    shared = takewhile(lambda words: len(set(words)) == 1, zip(*paths, strict=False))
    return [words[0] for words in shared]


def _find(name: str, paths: list[str]) -> str | None:
    exact = [path for path in paths if name in (path, path.rpartition(".")[2])]
    for word in _CALLED.get(name, ()):
        exact += [path for path in paths if word in path]
    if not exact and name == "text_decoder":
        exact = [path for path in paths if path.split(".")[0] in ("model", "transformer")]
    return exact[0] if exact else None


def _membership(known: dict[str, list[str]], path: str) -> Callable[[str], bool]:
    own = set(known[path])
    others = {name for where, names in known.items() if where != path for name in names}
    # Another model may have tensors that the donor lacks; they belong where their path says.
    return lambda name: name in own or (name not in others and name.startswith(f"{path}."))
