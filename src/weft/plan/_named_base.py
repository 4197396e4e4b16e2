"""Whether the base is the model that an adapter names as its own, as far as names can tell.

Shapes tell models of other sizes apart, and nothing tells a chat model from the base model that it
was trained from but what they are called. Only two ids on the hub say for sure that they differ:
folders have all kinds of names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from weft.formats.hub import repository

if TYPE_CHECKING:
    from weft.core.specs import Adapter, Checkpoint

# How a copy is stored, and the publisher's name that some ids repeat.
_OF_COPIES = {
    *("hf", "bnb", "4bit", "8bit", "nf4", "int4", "int8", "fp8", "fp16", "bf16", "gptq", "awq"),
    *("unsloth", "meta"),
}


def other_base(base: Checkpoint, adapter: Adapter) -> tuple[list[str], list[str]]:
    """Warnings and notes on the base that `adapter` names."""
    named = adapter.base_model
    if named is None or named == base.given:
        return [], []
    theirs, ours = repository(named), repository(base.folder)
    said = f"{adapter.given} names {named} as its base, and {base.given}"
    if theirs and ours:
        if theirs.lower() == ours.lower():
            return [], []
        if _model(theirs) == _model(ours):
            return [], [f"{said} is taken for a copy of that"]
        warning = (
            f"{said} is another model by its name: ΔW belongs to the model that it was trained on; "
            "give that one as the base, unless the two are the same"
        )
        return [warning], []
    saved_from = repository(str(base.config.get("_name_or_path")))
    if theirs and saved_from and theirs.lower() == saved_from.lower():
        return [], []
    folder, other = (named, ours) if ours else (base.folder, named)
    if _calls_it_otherwise(folder, other):
        return [], [f"{said} is called otherwise: make sure that it is that model"]
    return [], []


def _model(repo: str) -> set[str]:
    """The words of a model's name, without whose it is and how it is stored."""
    name = repo.lower().rpartition("/")[2]
    return set(re.split(r"[-_]", name)) - _OF_COPIES


def _calls_it_otherwise(folder: str, other: str) -> bool:
    """Whether a folder's name is that of a model, and not of `other`.

    A name that has no word in common with the other is none of the same kind (`base`, `run-7`), and
    one that only leaves words out is short for it. Numbers are dates, steps and versions.
    """
    mine, theirs = (
        {word for word in re.split(r"[-_.\s]", name) if not re.fullmatch(r"v?\d*", word)}
        for name in (_model_of_path(folder), _model_of_path(other))
    )
    mine, theirs = mine - _OF_COPIES, theirs - _OF_COPIES
    return bool(mine & theirs) and not mine <= theirs


def _model_of_path(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1].partition("@")[0].lower()
