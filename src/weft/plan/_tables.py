"""Tables with a row for each token: brought in the order of the output's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from weft.core.errors import Problem, WeftError
from weft.core.specs import Rows, Run
from weft.plan._stacks import comes_before, place

if TYPE_CHECKING:
    from weft.core.specs import TensorJob
    from weft.plan._views import View
    from weft.plan._vocabulary import Vocabulary
    from weft.recipes.records import ModelName, Recipe

Views = Mapping["ModelName", "View"]
_HEADS = {"lm_head", "embed_out", "output", "output_layer", "output_projection", "predictions"}


def vocabulary_of(recipe: Recipe, views: Views) -> tuple[Vocabulary | None, list[Problem]]:
    """The vocabulary that the recipe asks for, if it does."""
    if recipe.tokenizer is None:
        return None, []
    from weft.plan._vocabulary import build

    problems = [
        Problem(f"the config.json of {name} says no vocab_size, so its tokens have no rows")
        for name, view in views.items()
        if view.vocabulary is None
    ]
    if problems:
        return None, problems
    folders = {name: view.tokenizer for name, view in views.items()}
    sizes = {name: view.vocabulary or 0 for name, view in views.items()}
    try:
        return build(recipe.tokenizer, recipe.base_model, folders, sizes), []
    except WeftError as error:
        return None, [Problem(str(error), error.hint)]


def arranged(
    vocabulary: Vocabulary, model: ModelName, name: str, job: TensorJob, views: Views
) -> TensorJob:
    """The tensor with its rows in the new order, if it has a row for each token."""
    view = views[model]
    if not is_table(view, name, job):
        return job
    runs, padding = vocabulary.runs[model], vocabulary.padding
    own = vocabulary.models.index(model)
    if runs == (Run(job.shape[0], ((own, 0),)),) and not padding:
        return job
    used = sorted({source for run in runs for source, _ in run.parts} | {own})
    sources = []
    for number in used:
        other = views[vocabulary.models[number]].tensor(name)
        if other is None:
            raise WeftError(f"{vocabulary.models[number]} has no {name}, whose rows are needed")
        sources.append(other.expression)
    renumbered = tuple(
        Run(run.count, tuple((used.index(source), first) for source, first in run.parts))
        for run in runs
    )
    shape = (vocabulary.rows + padding, *job.shape[1:])
    return replace(job, shape=shape, expression=Rows(tuple(sources), renumbered, padding))


def is_table(view: View, name: str, job: TensorJob) -> bool:
    """Whether the tensor has a row for each token: an embedding, a head, or a head's bias."""
    if job.shape[:1] != (view.vocabulary,) or place(name, view.stacks).stack:
        return False
    head = not _HEADS.isdisjoint(name.split("."))
    return head or (len(job.shape) == 2 and comes_before(name))
