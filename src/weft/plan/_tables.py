"""Tables with a row for each token: brought in the order of the output's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from weft.core.errors import PlanError, Problem
from weft.core.specs import Rows, Run
from weft.plan._stacks import comes_before, place
from weft.plan._views import folders

if TYPE_CHECKING:
    from weft.core.specs import Shape, TensorJob
    from weft.plan._views import View
    from weft.plan._vocabulary import Vocabulary
    from weft.recipes.records import ModelName, Recipe, Slice, Source

Views = Mapping["ModelName", "View"]
_HEADS = {"lm_head", "embed_out", "output", "output_layer", "output_projection", "predictions"}


def vocabulary_of(recipe: Recipe, views: Views) -> tuple[Vocabulary | None, list[Problem]]:
    """The vocabulary that the recipe asks for, if it does."""
    if recipe.tokenizer is None:
        return None, []
    from weft.plan._vocabulary import build

    where = "tokenizer" if "tokenizer" in recipe.positions else "tokenizer_source"
    problems = [
        Problem(
            f"the config.json of {name} says no vocab_size, so its tokens have no rows  @ {where}",
            "write into it how many rows its embedding has, as vocab_size, such as 32000; or "
            f"leave `{where}` out of the recipe",
        )
        for name, view in views.items()
        if view.vocabulary is None
    ]
    if problems:
        return None, problems
    merged = [s.model for m in recipe.modules for each in m.slices for s in each.sources]
    sizes = {name: views[name].vocabulary or 0 for name in dict.fromkeys(merged)}
    try:
        return build(recipe.tokenizer, recipe.base_model, folders(views), sizes), []
    except PlanError as error:
        return None, [Problem(f"{p.what}  @ {where}", p.hint) for p in error.problems]


def arranged(
    vocabulary: Vocabulary,
    slice: Slice,
    base: ModelName | None,
    name: str,
    tensors: Sequence[tuple[Source, TensorJob]],
    views: Views,
) -> list[tuple[Source, TensorJob]]:
    """The tensors of a slice's sources with their rows in the new order, if they are tables.

    A row that one of them lacks is made from those of the others.
    """
    from weft.plan._vocabulary import arranged as rows_of

    if not all(is_table(views[source.model], name, job) for source, job in tensors):
        return list(tensors)
    models = tuple(dict.fromkeys(source.model for source, _ in tensors))
    if models == vocabulary.models:
        runs = vocabulary.runs
    else:
        runs = rows_of(vocabulary.alignment, models, slice.base_model or base)
    jobs = {source.model: job for source, job in tensors}
    shape = (vocabulary.rows + vocabulary.padding, *tensors[0][1].shape[1:])
    return [
        (source, _in_order(models, runs[source.model], vocabulary.padding, jobs, job, shape))
        for source, job in tensors
    ]


def _in_order(
    models: tuple[ModelName, ...],
    runs: tuple[Run, ...],
    padding: int,
    jobs: Mapping[ModelName, TensorJob],
    job: TensorJob,
    shape: Shape,
) -> TensorJob:
    """One table; as it is, if every row stays where it is."""
    (first, *more) = runs or (Run(0, ()),)
    alone = not more and not padding and first.count == job.shape[0]
    if alone and len(first.parts) == 1 and jobs[models[first.parts[0][0]]] is job:
        return job
    used = sorted({number for run in runs for number, _ in run.parts})
    sources = tuple(jobs[models[number]].expression for number in used) or (job.expression,)
    renumbered = tuple(
        Run(run.count, tuple((used.index(number), row) for number, row in run.parts))
        for run in runs
    )
    return replace(job, shape=shape, expression=Rows(sources, renumbered, padding))


def is_table(view: View, name: str, job: TensorJob) -> bool:
    """Whether the tensor has a row for each token: an embedding, a head, or a head's bias."""
    if job.shape[:1] != (view.vocabulary,) or place(name, view.stacks).stack:
        return False
    head = not _HEADS.isdisjoint(name.split("."))
    return head or (len(job.shape) == 2 and comes_before(name))
