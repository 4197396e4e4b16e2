"""The files beside the weights of a recipe's output: the donor's, true to what is written.

The donor is the base model, or without one the first model that the recipe names.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from weft.core.errors import PlanError, Problem
from weft.core.specs import SideFile
from weft.formats.side_files import PROCESSOR, TEMPLATE, TOKENIZER, part_of
from weft.plan._modules import modules_of
from weft.plan._replicated import KINDS, NUMBERS, attention_kinds, per_layer, told_by_number
from weft.plan._side_files import patched
from weft.plan._slices import sequence
from weft.plan._stacks import DEPTHS
from weft.plan._views import folders, lasting

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from weft.core.specs import TensorJob
    from weft.plan._stacks import Stack
    from weft.plan._views import View
    from weft.plan._vocabulary import Vocabulary
    from weft.recipes.records import ModelName, Recipe

# What the paths of towers beside the text, and the parts of the config that describe them, share.
_TOWERS = ("vision", "visual", "audio")
RECIPE = "mergekit_config.yml"  # tools look for it by this name


def recipe_files(
    recipe: Recipe,
    views: Mapping[ModelName, View],
    donor: View,
    jobs: Sequence[TensorJob],
    dtype: str | None,
    vocabulary: Vocabulary | None,
) -> tuple[list[SideFile], list[str]]:
    """Every file beside the shards, and notes on where they come from.

    Args:
        recipe: What is made.
        views: Of which models.
        donor: Whose files are taken.
        jobs: The tensors of the output.
        dtype: What most of the output is written in.
        vocabulary: The new one, if there is one.

    Raises:
        PlanError: Layers are stacked that their numbers tell apart.
    """
    files = {side.name: side for side in donor.plan.side_files}
    notes = []
    taken = _kinds(files, vocabulary is None, not recipe.chat_template)
    if taken:
        notes.append(f"{taken} from {donor.name}")
    if "config.json" in files:
        untied = donor.tie is not None and any(job.name == donor.tie.head for job in jobs)
        if untied and donor.tie is not None:
            notes.append(
                f"{donor.tie.embedding} and {donor.tie.head} are tied in {donor.name} and not in "
                "all models: each is a tensor of its own now and tie_word_embeddings is false"
            )
        config = patched(
            _layered(recipe, views, donor, notes),
            dtype=dtype,
            cast=bool(recipe.dtype or recipe.out_dtype),
            rows=vocabulary.rows + vocabulary.padding if vocabulary else None,
            untied=untied,
        )
        files["config.json"] = SideFile("config.json", text=_json(config))
    if vocabulary:
        files = {name: side for name, side in files.items() if part_of(name) != TOKENIZER}
        files |= {side.name: side for side in vocabulary.files}
        notes += vocabulary.notes
    if recipe.chat_template:
        from weft.plan._chat_template import with_chat_template

        try:
            found, said = with_chat_template(
                recipe.chat_template, folders(views), list(files.values())
            )
        except PlanError as error:
            wrong = [Problem(f"{p.what}  @ chat_template", p.hint) for p in error.problems]
            raise PlanError("the chat template", wrong) from None
        files = {side.name: side for side in found}
        notes += said
    if "README.md" in files:
        del files["README.md"]
    files[RECIPE] = SideFile(RECIPE, text=recipe.text)
    return lasting([files[name] for name in sorted(files)], views.values()), notes


def _kinds(files: Collection[str], tokenizer: bool, template: bool) -> str:
    """`config, tokenizer and chat template`: what of these is there, and not made anew."""
    parts = {part_of(name) for name in files}
    parts -= {TOKENIZER} if not tokenizer else set()
    parts -= {TEMPLATE} if not template else set()
    there = ["config"] if "config.json" in files else []
    there += [part for part in (TOKENIZER, PROCESSOR, TEMPLATE) if part in parts]
    return " and ".join([", ".join(there[:-1]), there[-1]]) if there[1:] else "".join(there)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _layered(
    recipe: Recipe, views: Mapping[ModelName, View], donor: View, notes: list[str]
) -> dict[str, Any]:
    """The donor's config with as many layers as the output has, and the lists of what each is."""
    config: dict[str, Any] = json.loads(json.dumps(donor.config))
    for module, belongs in modules_of(recipe, donor, views, []):
        order = sequence(module)
        if order is None:
            continue
        stack = next(stack for stack in donor.stacks if belongs(f"{stack.path}.0"))
        for part in _parts_of(stack, config):
            depth = next(key for key in DEPTHS if part.get(key) == stack.count)
            before = part[depth]
            moved = [(new, where) for new, (_, old, where) in enumerate(order) if new != old]
            kinds = attention_kinds(part)
            if moved and kinds and kinds != part.get(KINDS):
                part[KINDS] = kinds
                notes.append(
                    f"{KINDS} of config.json says which attention each layer has, which no longer "
                    "follows from its number; transformers reads it from 4.53 on"
                )
            if reasons := told_by_number(part) if moved else []:
                what = (
                    "layers are stacked in another order, and the config gives a layer its kind "
                    f"by its number ({', '.join(reasons)}): layer {moved[0][0]} would become "
                    f"another  @ {moved[0][1]}"
                )
                raise PlanError("the recipe", [Problem(what, "keep every layer in its place")])
            for key, value in part.items():
                if key in DEPTHS and value == before:
                    part[key] = len(order)
                elif key in NUMBERS and isinstance(value, list):
                    part[key] = [
                        new
                        for new, (name, old, _) in enumerate(order)
                        if old in (_said(views[name], key) or [])
                    ]
                elif isinstance(value, list) and len(value) == before and per_layer(key):
                    part[key] = [_entry(views[name], key, old, value) for name, old, _ in order]
    return config


def _parts_of(stack: Stack, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a config that count this stack's layers, and no other tower's."""
    named = [("", config), *((k, v) for k, v in config.items() if isinstance(v, dict))]
    counting = [(k, v) for k, v in named if any(v.get(key) == stack.count for key in DEPTHS)]

    def tower(name: str) -> bool:
        return any(word in name for word in _TOWERS)

    return [part for name, part in counting if tower(name) == tower(stack.path)]


def _entry(view: View, key: str, layer: int, donors: Sequence[Any]) -> Any:
    """What the model that a layer is from says of it."""
    value = _said(view, key)
    if value is not None and layer < len(value):
        return value[layer]
    return donors[layer] if layer < len(donors) else donors[-1]


def _said(view: View, key: str) -> list[Any] | None:
    """A list in the config of a model, or of a part of it."""
    parts = [view.config, *(v for v in view.config.values() if isinstance(v, dict))]
    found = (attention_kinds(part) if key == KINDS else part.get(key) for part in parts)
    return next((value for value in found if isinstance(value, list)), None)
