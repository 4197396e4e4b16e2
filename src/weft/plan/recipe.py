"""Recipe + models -> Plan: for every tensor of the output, what a merge method makes of which."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from weft import methods
from weft.core.dtypes import WEIGHTS, promote
from weft.core.errors import PlanError, Problem, WeftError
from weft.core.names import nearest
from weft.core.specs import Expression, Input, Load, Merge, Plan, TensorJob, job_bytes
from weft.formats.checkpoint import same_bytes
from weft.plan._computed import is_computed
from weft.plan._fit import Fit, architectures
from weft.plan._modules import modules_of
from weft.plan._recipe_files import recipe_files
from weft.plan._slices import Planned, planned
from weft.plan._tables import arranged, vocabulary_of
from weft.plan.merge import reshard
from weft.plan.preflight import dominant_dtype
from weft.recipes.parameters import MissingParameter, place_of, resolve

if TYPE_CHECKING:
    from weft.core.specs import Params
    from weft.plan._views import View
    from weft.plan._vocabulary import Vocabulary
    from weft.recipes.records import ModelName, Module, Recipe, Source

Views = Mapping["ModelName", "View"]
ALONE = "model.safetensors"  # whatever the one file of the first model is called
SAME, UNION, INTERSECTION = "same", "union", "intersection"  # tensors of the models
SHARD = 5_000_000_000  # bytes, where no input's shards fit the output


@dataclass(slots=True)
class _Draft:
    """What is known so far."""

    recipe: Recipe
    views: Views
    donor: View
    vocabulary: Vocabulary | None
    seed: int
    tensors: str
    fit: Fit
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    jobs: list[TensorJob] = field(default_factory=list)
    computed: dict[str, ModelName] = field(default_factory=dict)
    lacking: dict[ModelName, list[str]] = field(default_factory=dict)
    uncovered: dict[tuple[str, str, ModelName | None], list[MissingParameter]] = field(
        default_factory=dict
    )


def plan_recipe(
    recipe: Recipe,
    views: Views,
    *,
    seed: int = 0,
    max_shard_size: int | None = None,
    tensors: str = SAME,
) -> Plan:
    """Say what every tensor of the output is.

    Args:
        recipe: One document.
        views: Every model that it names.
        seed: Of the methods that draw at random.
        max_shard_size: Bytes per shard; None keeps the shards of the first model (the base, if
            there is one) where the output has the same tensors, and else fills shards of 5 GB.
        tensors: `same`, all models have the same; `union`, what one lacks is made of the others;
            `intersection`, what one lacks is left out.

    Raises:
        PlanError: The models do not fit the recipe or each other; every reason found.
    """
    donor = views[recipe.base_model or recipe.models()[0]]
    vocabulary, problems = vocabulary_of(recipe, views)
    if architectures(recipe, views)[0]:  # of which all else would follow
        raise PlanError(recipe.name or "the recipe", misfits(recipe, views))
    draft = _Draft(recipe, views, donor, vocabulary, seed, tensors, Fit(recipe, views), problems)
    for module, belongs in modules_of(recipe, donor, views, draft.problems):
        for each in planned(module, belongs, views, donor, draft.fit, draft.problems):
            _add(draft, module, each)
    draft.problems += draft.fit.problems()
    draft.problems += _uncovered(draft)
    unmatched = _unmatched(draft)
    if draft.problems:
        raise PlanError(recipe.name or "the recipe", draft.problems)
    jobs = _sharded(draft.jobs, donor, max_shard_size)
    written = dominant_dtype((job.dtype, job_bytes(job)) for job in jobs)
    files, beside = recipe_files(recipe, views, donor, jobs, written, vocabulary)
    plans = [views[name].plan for name in recipe.models()]
    metadata = {**dict(donor.plan.metadata), "format": "pt"}
    return Plan(
        jobs=tuple(jobs),
        metadata=tuple(sorted(metadata.items())),
        side_files=tuple(files),
        inputs=tuple(_inputs(recipe, views)),
        notes=tuple(
            dict.fromkeys(
                [
                    *recipe.notes,
                    *_without_layers(draft),
                    *_left_out(draft),
                    *(n for p in plans for n in p.notes),
                ]
            )
        ),
        beside=tuple(beside),
        warnings=tuple(
            dict.fromkeys([*unmatched, *(said for plan in plans for said in plan.warnings)])
        ),
        repairs=tuple(dict.fromkeys(repair for plan in plans for repair in plan.repairs)),
    )


def misfits(recipe: Recipe, views: Views) -> list[Problem]:
    """Which of the models that are in `views` do not fit each other; the others count for none."""
    problems, odd = architectures(recipe, views)
    views = {model: view for model, view in views.items() if model not in odd}
    there = _only(recipe, views)
    if not there.modules:
        return problems
    fit, donor = Fit(there, views), views[there.models()[0]]
    for module, belongs in modules_of(there, donor, views, problems):
        for each in planned(module, belongs, views, donor, fit, problems):
            named = zip(each.slice.sources, each.inputs, strict=True)
            found = [(source, views[source.model].tensor(name)) for source, name in named]
            fit.shapes(each.name, [(source, job) for source, job in found if job])
    return [*problems, *fit.problems()]


def _only(recipe: Recipe, views: Views) -> Recipe:
    """The recipe, of these models alone."""
    modules = []
    for module in recipe.modules:
        cut = [
            replace(each, sources=tuple(s for s in each.sources if s.model in views))
            for each in module.slices
        ]
        if slices := tuple(each for each in cut if each.sources):
            modules.append(replace(module, slices=slices))
    return replace(recipe, modules=tuple(modules))


def _add(draft: _Draft, module: Module, each: Planned) -> None:
    """One tensor of the output, or what is wrong with it."""
    recipe, own = draft.recipe, methods.method(draft.recipe.method)
    tensors = _tensors(draft, each)
    if tensors is None:
        return
    base_name = (each.slice.base_model or recipe.base_model) if own.BASE != "none" else None
    sources = [s for s, _ in tensors if s.model != base_name]
    base = next((t for s, t in tensors if s.model == base_name), None)
    inputs = [t for s, t in tensors if s.model != base_name]
    lacking = base_name if base is None else None
    if few := _too_few(draft, each, own, lacking, len(inputs)):
        draft.problems.append(few)
        return
    found = _parameters(draft, module, each, own, sources)
    if found is None:
        return
    shared, per_input = found
    # Documents of one file draw apart: masks that are alike would drop the same elements again.
    key = ":".join([str(draft.seed), *filter(None, [recipe.name]), recipe.method, each.name])
    asked = tuple(dict(params) for params in per_input)
    task = methods.Task(tensors[0][1].shape, 1, len(inputs), dict(shared), asked, key)
    if wrong := methods.check(own, task):
        problem = Problem(f"{recipe.method}: {wrong.what}  @ {each.slice.where}", wrong.hint)
        if problem not in draft.problems:  # once for all the tensors that it is the same for
            draft.problems.append(problem)
        return
    merge = Merge(
        recipe.method,
        base.expression if base else None,
        tuple(t.expression for t in inputs),
        shared,
        per_input,
        key,
    )
    expression = _simplified(merge, own)
    jobs = [t for _, t in tensors]
    dtype = promote([job.dtype for job in jobs])
    if dtype in WEIGHTS:
        dtype = recipe.out_dtype or recipe.dtype or dtype
    elif not _identical(jobs):
        models = ", ".join(str(source.model) for source in each.slice.sources)
        draft.problems.append(
            Problem(
                f"{each.name} holds {dtype} and differs between {models}: "
                f"numbers that are no weights cannot be merged  @ {each.slice.where}",
                "give it to one model by a filter, or make the models agree in it",
            )
        )
    else:
        expression = jobs[0].expression
    draft.jobs.append(TensorJob(each.name, dtype, jobs[0].shape, jobs[0].shard, expression))


def _parameters(
    draft: _Draft, module: Module, each: Planned, own: methods.Method, sources: list[Source]
) -> tuple[Params, tuple[Params, ...]] | None:
    """The parameters of the tensor: those that all share, and those of every input."""
    names = {s.model: n for s, n in zip(each.slice.sources, each.inputs, strict=True)}

    def ask(some: list[Source]) -> tuple[Params, tuple[Params, ...]]:
        return resolve(
            draft.recipe,
            module,
            each.slice,
            own.PARAMETERS,
            some,
            input_names=[names[source.model] for source in some],
            output_name=each.name,
            t=each.t,
        )

    try:
        return ask(sources)
    except WeftError as error:
        if not isinstance(error, MissingParameter):
            draft.problems.append(Problem(f"{error}  @ {each.slice.where}", error.hint))
            return None
    for source in sources:
        try:
            ask([source])
        except MissingParameter as error:
            where = place_of(draft.recipe, module, each.slice, error.name, error.model)
            draft.uncovered.setdefault((where, error.name, error.model), []).append(error)
    return None


def _uncovered(draft: _Draft) -> list[Problem]:
    """Parameters that the recipe has for other tensors only: once for all that they miss."""
    problems = []
    for (where, name, model), errors in draft.uncovered.items():
        whose = f" of {model}" if model else ""
        what = f'no "{name}"{whose} for {errors[0].tensor}'
        what += f" and {len(errors) - 1} tensors more" if len(errors) > 1 else ""
        filters = ": the filters of the recipe are of others"
        problems.append(Problem(f"{what}{filters}  @ {where}", errors[0].hint))
    return problems


def _tensors(draft: _Draft, each: Planned) -> list[tuple[Source, TensorJob]] | None:
    """The tensor of every source, all of one shape."""
    found: list[tuple[Source, TensorJob]] = []
    for source, name in zip(each.slice.sources, each.inputs, strict=True):
        view = draft.views[source.model]
        job = view.tensor(name)
        if job is None and draft.tensors != SAME:
            draft.lacking.setdefault(source.model, []).append(each.name)
            if draft.tensors == INTERSECTION:
                return None
            continue
        if job is None and is_computed(name):
            draft.computed[re.sub(r"\.\d+\.", ".*.", each.name)] = source.model
            return None
        if job is None:
            near = nearest(name, view.tensors)
            draft.problems.append(
                Problem(
                    f"{source.model} has no {name}, which {each.owner} has  @ {source.where}",
                    f"the nearest name there is {near[0]}" if near else None,
                )
            )
            return None
        found.append((source, job))
    if draft.vocabulary:
        base = draft.recipe.base_model
        try:
            found = arranged(draft.vocabulary, each.slice, base, each.name, found, draft.views)
        except PlanError as error:
            draft.problems += error.problems
            return None
    return found if draft.fit.shapes(each.name, found) else None


def _too_few(
    draft: _Draft, each: Planned, own: methods.Method, lacking: ModelName | None, count: int
) -> Problem | None:
    """Why the method cannot do without the models that lack the tensor, if it cannot."""
    hint = "--tensor-intersection leaves such tensors out"
    at = f"@ {each.slice.where}"
    if lacking is not None:
        return Problem(f"the base {lacking} has no {each.name}, which others have  {at}", hint)
    if draft.tensors == UNION and count < own.INPUTS[0]:
        least = f"{own.INPUTS[0]} model{'s' if own.INPUTS[0] > 1 else ''}"
        what = f"{draft.recipe.method} takes {least}, and of those that have {each.name} there are"
        return Problem(f"{what} {count}  {at}", hint)
    return None


def _simplified(expression: Merge, own: methods.Method) -> Expression:
    """The same without a method, where that changes no bit."""
    if expression.method == "passthrough" and dict(expression.each[0]).get("scale") in (None, 1):
        return expression.inputs[0]
    # Nothing differs from the base (an adapter that leaves this tensor alone).
    same = own.TASK_VECTORS and all(each == expression.base for each in expression.inputs)
    return expression.base if same and expression.base is not None else expression


def _identical(jobs: Sequence[TensorJob]) -> bool:
    first = jobs[0].expression
    return all(
        each.expression == first
        or (
            isinstance(each.expression, Load)
            and isinstance(first, Load)
            and same_bytes(first.ref, each.expression.ref)
        )
        for each in jobs[1:]
    )


def _without_layers(draft: _Draft) -> list[str]:
    """Gradients over the layers of files that have no config to count them."""
    recipe = draft.recipe
    slices = [each for module in recipe.modules for each in module.slices]
    sources = [source for each in slices for source in each.sources]
    if any(view.config for view in draft.views.values()) or any(s.layers for s in sources):
        return []
    settings = [recipe.parameters, *(each.parameters for each in recipe.modules)]
    settings += [*(each.parameters for each in slices), *(each.parameters for each in sources)]
    lists = [
        name
        for each in settings
        for name, conditions in each.items()
        if any(isinstance(c.value, tuple) and len(c.value) > 1 for c in conditions)
    ]
    return [
        f"{name}: files of tensors have no layers, and the first value of the list is that of all, "
        "as in mergekit-pytorch"
        for name in dict.fromkeys(lists)
    ]


def _left_out(draft: _Draft) -> list[str]:
    """What not all models hold, and so is left out, or made of those that do."""
    notes = [
        f"left out: {name}, which {model} lacks; models compute it"
        for name, model in draft.computed.items()
    ]
    became = "left out" if draft.tensors == INTERSECTION else "made of the others"
    for model, names in draft.lacking.items():
        more = f" and {len(names) - 1} tensors more" if len(names) > 1 else ""
        notes.append(f"{became}: {names[0]}{more}, which {model} lacks")
    return notes


def _unmatched(draft: _Draft) -> list[str]:
    """Filters that no tensor's name holds: MergeKit takes them without a word."""
    recipe = draft.recipe
    names = {job.name for job in draft.jobs} | {
        name for view in draft.views.values() for name in view.tensors
    }
    names |= {view.tie.head for view in draft.views.values() if view.tie}
    found: list[str] = []
    places = [(recipe.parameters, "parameters")]
    for module in recipe.modules:
        places.append((module.parameters, f"{module.where}.parameters"))
        for each in module.slices:
            places.append((each.parameters, f"{each.where}.parameters"))
            places += [(s.parameters, f"{s.where}.parameters") for s in each.sources]
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    for settings, where in places:
        for parameter, conditions in settings.items():
            for number, condition in enumerate(conditions):
                text = condition.filter
                if not text or text == "*" or any(text in name for name in names):
                    continue
                near = nearest(text, parts, 1)
                meant = f", did you mean {near[0]!r}?" if near else ";"
                own = f"{where}.{parameter}"
                exact = (f"{own}[{number}].filter", f"{own}.filter", own)
                line = next((recipe.positions[x] for x in exact if x in recipe.positions), None)
                at = f"{own}, line {line[0]}, column {line[1]}" if line else own
                found.append(
                    f"the filter {text!r} of {parameter} matches no tensor, and so does nothing"
                    f"{meant} a filter is a plain part of a tensor's name  @ {at}"
                )
    return found


# ------------------------------------------------------------------------------------ the output


def _sharded(jobs: list[TensorJob], donor: View, limit: int | None) -> list[TensorJob]:
    homes = {job.name: job.shard for job in donor.plan.jobs}
    if limit is None and all(job.name in homes for job in jobs):
        jobs = [replace(job, shard=homes[job.name]) for job in jobs]
        order = {name: number for number, name in enumerate(homes)}
        jobs.sort(key=lambda job: order[job.name])
        same = {job.shard for job in jobs} == set(homes.values())
        sizes = {job.name: job_bytes(job) for job in donor.plan.jobs}
        if same and all(job_bytes(job) <= sizes[job.name] for job in jobs):
            several = len(set(homes.values())) > 1
            # Diffusers looks for a name of its own.
            kept = several or "_class_name" in donor.config
            return jobs if kept else [replace(job, shard=ALONE) for job in jobs]
    return reshard(jobs, limit or SHARD)


def _inputs(recipe: Recipe, views: Views) -> list[Input]:
    """Every file that is read, each once, under the role of the first model that it belongs to."""
    found: dict[str, Input] = {}
    number = 0
    for name in recipe.models():
        if name == recipe.base_model:
            role = "base"
        else:
            number += 1
            role = f"model {number}"
        for entry in views[name].plan.inputs:
            known = "" if entry.role == "base" else f" {entry.role}"
            found.setdefault(entry.path, replace(entry, role=f"{role}{known}"))
    return list(found.values())
