"""`weft run`: a MergeKit recipe, from YAML to a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from weft.api._execution import Report, check_place, execute
from weft.api._models import Models, named
from weft.api.extract import ExtractPlanned, ExtractReport, plan_extraction, run_extraction
from weft.core import events, units
from weft.core.errors import (
    NotFound,
    PlanError,
    Problem,
    RecipeError,
    WeftError,
    as_problems,
)
from weft.formats.hub import NotFetched, local, nothing_fetched, sought
from weft.recipes._rough import rough
from weft.recipes.mergekit import draft, read
from weft.recipes.records import ModelName

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weft.core.specs import Plan
    from weft.plan._views import View
    from weft.plan.preflight import Work
    from weft.recipes.extraction import Extraction
    from weft.recipes.records import Recipe


_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"}


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What `run` would do.

    Attributes:
        recipe: The document that makes the output; those before it are streamed into it.
        plan: Every tensor of the output.
        work: Its size.
        credits: Every model and adapter that it is made from, as the recipe names them.
        warnings: What the user should know before using the output.
    """

    recipe: Recipe
    plan: Plan = field(repr=False)
    work: Work
    credits: tuple[str, ...]
    warnings: tuple[str, ...]


def run(
    recipe: str | Path,
    *,
    output: str | Path,
    seed: int = 0,
    max_shard_size: str | int | None = None,
    tensors: str = "same",
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    cache_dir: str | None = None,
    command: str | None = None,
    on_event: events.OnEvent = events.ignore,
) -> Report | ExtractReport:
    """Make the model that a MergeKit recipe describes, in one pass, float32, one rounding.

    Or the adapter that an extraction recipe describes (see `weft.extract`).

    Args:
        recipe: Path of a YAML file.
        output: Folder to create.
        seed: Of the methods that draw at random (DARE, DELLA).
        max_shard_size: Such as `5GB`; None keeps the shards of the base, or else fills 5 GB.
        tensors: `same`, all models must have the same; `union`, what one lacks is made of the
            others; `intersection`, what one lacks is left out.
        threads: None takes what affinity and cgroup allow.
        device: `cpu`, `cuda` or `cuda:1`, where the arithmetic is done.
        force: Replace an output that is there already.
        resume: Finish an interrupted run.
        cache_dir: The hub's cache, in place of HF_HOME's.
        command: What the card and the manifest quote; None writes the Python call.
        on_event: Called with progress, from several threads.

    Raises:
        WeftError: See `weft.core.errors`; the output is not there, and `resume` may finish it.
    """
    from weft.write.card import recipe_card

    begin = time.perf_counter()
    command = command or f"weft.run({str(recipe)!r}, output={str(output)!r}, seed={seed})"
    if extraction := _extraction(recipe, seed, max_shard_size, tensors, cache_dir):
        return run_extraction(
            extraction.tuned, extraction.base, extraction.wishes, output=Path(output),
            threads=threads, device=device, force=force, resume=resume, cache_dir=cache_dir,
            command=command, on_event=on_event,
        )  # fmt: skip
    count = check_place(device, threads)
    opened = Models(cache_dir)
    last, plan = _plan(recipe, opened, seed, max_shard_size, tensors)
    credits = opened.credits()
    weft = version("weft")
    return execute(
        plan,
        Path(output),
        operation="run",
        command=command,
        card=lambda sums: recipe_card(last, credits, sums, command=command, version=weft),
        examine=opened.examine,
        begin=begin,
        threads=count,
        device=device,
        force=force,
        resume=resume,
        on_event=on_event,
    )


def plan_run(
    recipe: str | Path,
    *,
    output: str | Path | None = None,
    seed: int = 0,
    max_shard_size: str | int | None = None,
    tensors: str = "same",
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    cache_dir: str | None = None,
) -> RunPlan | ExtractPlanned:
    """What `run` would do with these arguments; reads headers, configs and adapters' factors.

    Raises:
        WeftError: What `run` would stop at before it writes.
    """
    from weft.plan.preflight import measure
    from weft.write.checkpoint import check_output

    if extraction := _extraction(recipe, seed, max_shard_size, tensors, cache_dir):
        return plan_extraction(
            extraction.tuned, extraction.base, extraction.wishes,
            output=None if output is None else Path(output), threads=threads, device=device,
            force=force, resume=resume, cache_dir=cache_dir,
        )  # fmt: skip
    threads = check_place(device, threads)
    opened = Models(cache_dir)
    last, plan = _plan(recipe, opened, seed, max_shard_size, tensors)
    if output is not None:
        check_output(Path(output), plan, force=force, resume=resume)
    warnings = (*opened.examine(), *plan.warnings)
    return RunPlan(last, plan, measure(plan, threads), opened.credits(), warnings)


def read_recipe(path: str | Path) -> list[Recipe]:
    """The documents of a recipe, in the order in which they are to be run.

    Raises:
        WeftError: No such file, no YAML, or no recipe; every problem found.
    """
    return read(_text(Path(path)), Path(path).name)


def _read_with_models(path: Path, opened: Models) -> list[Recipe]:
    """As `read_recipe`; what is wrong with the file is said with what is wrong with its models.

    Raises:
        WeftError: As there.
    """
    found = draft(_text(path), path.name)
    if not found.problems:
        return found.recipes
    missing = _missing(found.recipes, opened, path.parent, found.no_models)
    raise RecipeError(path.name, [*found.problems, *missing])


def _missing(
    recipes: Iterable[Recipe], opened: Models, folder: Path, no_models: Iterable[str] = ()
) -> list[Problem]:
    """The models of faulty recipes that are not there, or do not fit; nothing is fetched for it."""
    from weft.plan.recipe import misfits

    found = []
    with nothing_fetched():
        for recipe in recipes:
            views, problems = _views(recipe, opened, dict.fromkeys(no_models), folder)
            if recipe.method and recipe.is_whole:
                problems += misfits(recipe, views)
            found += _located(problems, recipe)
    return found


def _extraction(
    path: str | Path,
    seed: int,
    max_shard_size: str | int | None,
    tensors: str,
    cache_dir: str | None,
) -> Extraction | None:
    """What the file asks for, if it is an extraction recipe."""
    from weft.recipes import extraction

    name = Path(path).name
    document = extraction.find(_text(Path(path)), name)
    if document is None:
        return None
    if max_shard_size is not None:
        raise WeftError(f"{name} makes an adapter, which has one file", "no --max-shard-size")
    if tensors != "same":
        what = f"{name} makes an adapter, of the tensors that both models have"
        raise WeftError(what, f"no --tensor-{tensors}")
    missing = _missing([rough(document, named)], Models(cache_dir), Path(path).parent)
    try:
        found = extraction.read(document, name)
    except RecipeError as error:
        raise RecipeError(name, [*error.problems, *missing]) from None
    if missing:
        raise RecipeError(name, missing)
    wishes = found.wishes
    return replace(found, wishes=replace(wishes, seed=wishes.seed or seed))


def _text(path: Path) -> str:
    if path.suffix in _WEIGHTS and path.is_file():
        hint = "name it under `models:` of a recipe, a YAML file; weft inspect says what it holds"
        raise WeftError(f"{path} is a file of weights, not a recipe", hint)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"there is no {path}", "give the path of a recipe, a YAML file") from None
    except IsADirectoryError:
        found = path / "mergekit_config.yml"
        hint = f"give the recipe in it: {found}" if found.is_file() else "give a YAML file"
        raise WeftError(f"{path} is a folder, not a recipe", hint) from None
    except UnicodeDecodeError as error:
        what = f"{path} is no text, and so no recipe: byte {error.start} is not UTF-8"
        raise WeftError(what, "give a YAML file") from None
    except OSError as error:
        raise WeftError(
            f"cannot read {path}: {error.strerror or error}", "give a YAML file"
        ) from None


def _plan(
    path: str | Path, opened: Models, seed: int, size: str | int | None, tensors: str
) -> tuple[Recipe, Plan]:
    """Plan every document; each but the last becomes a model of those after it."""
    limit = None if size is None else units.parse_size(str(size))
    from weft.plan._views import outcome
    from weft.plan.recipe import INTERSECTION, SAME, UNION, misfits, plan_recipe

    if tensors not in (SAME, UNION, INTERSECTION):
        raise WeftError(f"tensors={tensors!r}", f"one of {SAME}, {UNION}, {INTERSECTION}")
    made: dict[str, View | None] = {}  # by the name of the document; None where it cannot be made
    wrong: list[Problem] = []
    recipes = _read_with_models(Path(path), opened)
    used = {name.path for recipe in recipes for name in recipe.models()}
    idle = [each.name for each in recipes[:-1] if each.name not in used]
    said = f"no document uses {', '.join(map(str, idle))}, and only the last one is written"
    for recipe in recipes:
        made[recipe.name or ""] = None
        try:
            views, missing = _views(recipe, opened, made, Path(path).parent)
            if missing:
                raise PlanError(recipe.name or "", [*missing, *misfits(recipe, views)])
            if len(views) < len(recipe.models()):
                continue
            plan = plan_recipe(recipe, views, seed=seed, max_shard_size=limit, tensors=tensors)
        except PlanError as error:
            wrong += _located(error.problems, recipe)
            continue
        donor = views[recipe.base_model or recipe.models()[0]]
        given = tuple(dict.fromkeys(text for view in views.values() for text in view.given))
        made[recipe.name or ""] = outcome(recipe.name or "", plan, donor, given)
    if wrong:
        raise RecipeError(Path(path).name, wrong)
    return recipe, replace(plan, warnings=(*plan.warnings, said)) if idle else plan


def _views(
    recipe: Recipe, opened: Models, made: Mapping[str, View | None], folder: Path
) -> tuple[dict[ModelName, View], list[Problem]]:
    """The models of a recipe, but for those that an earlier document failed to make.

    And what is wrong with the others: they do not exist, or adapters do not fit theirs.
    """
    views: dict[ModelName, View] = {}
    problems: list[Problem] = []
    for name in recipe.models():
        if name.path in made and made[name.path] is None:
            continue
        try:
            views[name] = opened.view(name, made.get(name.path))
        except NotFetched:
            continue
        except WeftError as error:
            at = _place(name, recipe)
            found = as_problems(error)
            if isinstance(error, NotFound):
                found = (_not_found(error, name, folder),)
            problems += [Problem(f"{p.what}  @ {at}", p.hint) for p in found]
    return views, problems


def _not_found(error: NotFound, name: ModelName, folder: Path) -> Problem:
    """With where a relative path was looked for, and whether it leads there from the recipe."""
    paths = [name.path, *(path for path, _, _ in name.adapters)]
    said = f" {error} "
    lost = next((p for p in paths if not local(p) and f" {units.clean(p)[:200]} " in said), None)
    if lost is None:
        return Problem(str(error), error.hint)
    hint, home = error.hint, folder.resolve()
    if local(str(home / lost)):
        hint = f"it exists beside the recipe: run from {home}, or write {home / lost}"
    return Problem(sought(error, lost), hint)


def _place(name: ModelName, recipe: Recipe) -> str:
    """Where the recipe names a model first."""
    tokenizer = recipe.tokenizer
    places = [(recipe.base_model, "base_model")]
    for module in recipe.modules:
        for each in module.slices:
            places += [(s.model, s.where) for s in each.sources]
            places.append((each.base_model, f"{each.where}.base_model"))
    if tokenizer and isinstance(tokenizer.source, ModelName):
        places.append((tokenizer.source, "tokenizer"))
    return next((where for model, where in places if model == name), "tokenizer")


def _located(problems: Sequence[Problem], recipe: Recipe) -> list[Problem]:
    """With line and column, where a problem ends in a place of the YAML."""
    found = []
    for problem in problems:
        fact, _, where = problem.what.partition("  @ ")
        known = where
        while known and known not in recipe.positions:  # old spellings say it elsewhere
            known = known.rpartition(".")[0]
        line, column = recipe.positions.get(known, (0, 0))
        at = f"  @ {where}, line {line}, column {column}" if line else f"  @ {where}"
        found.append(
            Problem(fact + (at if where else ""), problem.hint, (line, column) if line else None)
        )
    return found
