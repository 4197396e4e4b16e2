"""`weft run`: a MergeKit recipe, from YAML to a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from weft.api._execution import Report, check_place, execute
from weft.api._models import Models
from weft.core import events, units
from weft.core.errors import (
    NotFound,
    PlanError,
    Problem,
    RecipeError,
    WeftError,
    as_problems,
)
from weft.recipes.mergekit import read
from weft.recipes.records import ModelName

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.core.specs import Plan
    from weft.plan._views import View
    from weft.plan.preflight import Work
    from weft.recipes.records import Recipe


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
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    cache_dir: str | None = None,
    command: str | None = None,
    on_event: events.OnEvent = events.ignore,
) -> Report:
    """Make the model that a MergeKit recipe describes, in one pass, float32, one rounding.

    Args:
        recipe: Path of a YAML file.
        output: Folder to create.
        seed: Of the methods that draw at random (DARE, DELLA).
        max_shard_size: Such as `5GB`; None keeps the shards of the base, or else fills 5 GB.
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
    count = check_place(device, threads)
    opened = Models(cache_dir)
    last, plan = _plan(recipe, opened, seed, max_shard_size)
    credits = opened.credits()
    command = command or f"weft.run({str(recipe)!r}, output={str(output)!r}, seed={seed})"
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
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    cache_dir: str | None = None,
) -> RunPlan:
    """What `run` would do with these arguments; reads headers, configs and adapters' factors.

    Raises:
        WeftError: What `run` would stop at before it writes.
    """
    from weft.plan.preflight import measure
    from weft.write.checkpoint import check_output

    threads = check_place(device, threads)
    opened = Models(cache_dir)
    last, plan = _plan(recipe, opened, seed, max_shard_size)
    if output is not None:
        check_output(Path(output), plan, force=force, resume=resume)
    warnings = (*opened.examine(), *plan.warnings)
    return RunPlan(last, plan, measure(plan, threads), opened.credits(), warnings)


def read_recipe(path: str | Path) -> list[Recipe]:
    """The documents of a recipe, in the order in which they are to be run.

    Raises:
        WeftError: No such file, no YAML, or no recipe; every problem found.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"there is no {path}", "give the path of a recipe, a YAML file") from None
    except IsADirectoryError:
        found = path / "mergekit_config.yml"
        hint = f"give the recipe in it: {found}" if found.is_file() else "give a YAML file"
        raise WeftError(f"{path} is a folder, not a recipe", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise WeftError(f"cannot read {path}: {error}", "give a YAML file") from None
    return read(text, path.name)


def _plan(
    path: str | Path, opened: Models, seed: int, size: str | int | None
) -> tuple[Recipe, Plan]:
    """Plan every document; each but the last becomes a model of those after it."""
    limit = None if size is None else units.parse_size(str(size))
    from weft.plan._views import outcome
    from weft.plan.recipe import plan_recipe

    made: dict[str, View] = {}
    for recipe in read_recipe(path):
        views: dict[ModelName, View] = {}
        problems: list[Problem] = []
        for name in recipe.models():
            try:
                views[name] = opened.view(name, made.get(name.path))
            except WeftError as error:
                at = _place(name, recipe)
                problems += [Problem(f"{p.what}  @ {at}", p.hint) for p in as_problems(error)]
        try:
            if problems:
                raise PlanError("", problems)
            plan = plan_recipe(recipe, views, seed=seed, max_shard_size=limit)
        except PlanError as error:
            raise RecipeError(Path(path).name, _located(error.problems, recipe)) from None
        donor = views[recipe.base_model or recipe.models()[0]]
        given = tuple(dict.fromkeys(text for view in views.values() for text in view.given))
        made[recipe.name or ""] = outcome(recipe.name or "", plan, donor, given)
    return recipe, plan


def _place(name: ModelName, recipe: Recipe) -> str:
    """Where the recipe names a model first."""
    tokenizer = recipe.tokenizer
    places = [(recipe.base_model, "base_model")]
    for module in recipe.modules:
        for each in module.slices:
            places += [(s.model, s.where) for s in each.sources if s.where != "base_model"]
            places.append((each.base_model, f"{each.where}.base_model"))
    if tokenizer and isinstance(tokenizer.source, ModelName):
        places.append((tokenizer.source, "tokenizer"))
    return next((where for model, where in places if model == name), "tokenizer")


def _located(problems: Sequence[Problem], recipe: Recipe) -> list[Problem]:
    """With line and column, where a problem ends in a place of the YAML."""
    found = []
    for problem in problems:
        fact, _, where = problem.what.partition("  @ ")
        line, column = recipe.positions.get(where, (0, 0))
        at = f"  @ {where}, line {line}, column {column}" if line else f"  @ {where}"
        found.append(Problem(fact + (at if where else ""), problem.hint))
    return found
