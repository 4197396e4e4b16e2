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
from weft.core.errors import NotFound, PlanError, Problem, Unsupported, WeftError
from weft.recipes.mergekit import read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weft.core.specs import Plan
    from weft.plan._views import View
    from weft.plan.preflight import Work
    from weft.recipes.records import ModelName, Recipe


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
    recipes = read_recipe(recipe)
    opened = Models(cache_dir)
    plan = _plan(recipes, opened, seed, max_shard_size)
    last, credits = recipes[-1], opened.credits()
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
    recipes = read_recipe(recipe)
    opened = Models(cache_dir)
    plan = _plan(recipes, opened, seed, max_shard_size)
    if output is not None:
        check_output(Path(output), plan, force=force, resume=resume)
    last = recipes[-1]
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
    recipes: Sequence[Recipe], opened: Models, seed: int, max_shard_size: str | int | None
) -> Plan:
    """Plan every document; each but the last becomes a model of those after it."""
    size = None if max_shard_size is None else units.parse_size(str(max_shard_size))
    from weft.plan._views import outcome
    from weft.plan.recipe import plan_recipe

    made: dict[str, View] = {}
    for recipe in recipes:
        views, problems = {}, []
        for name in recipe.models():
            try:
                views[name] = _earlier(name, made) or opened.view(name)
            except WeftError as error:
                problems += _placed(error, name, recipe)
        if problems:
            raise PlanError(recipe.name or "the recipe", problems)
        plan = plan_recipe(recipe, views, seed=seed, max_shard_size=size)
        donor = views[recipe.base_model or recipe.models()[0]]
        given = tuple(dict.fromkeys(text for view in views.values() for text in view.given))
        made[recipe.name or ""] = outcome(recipe.name or "", plan, donor, given)
    return plan


def _earlier(name: ModelName, made: Mapping[str, View]) -> View | None:
    """What an earlier document makes, if that is what is named."""
    found = made.get(name.path)
    if found is not None and name.adapters:
        raise Unsupported(
            f"{name} adds an adapter to what another document of the recipe makes",
            f"run the document {name.path} by itself, and name its output here",
        )
    return found


def _placed(error: WeftError, name: ModelName, recipe: Recipe) -> list[Problem]:
    """What is wrong with a model, and where the recipe names it."""
    where = next(
        (
            source.where
            for module in recipe.modules
            for each in module.slices
            for source in each.sources
            if source.model == name
        ),
        "base_model",
    )
    line, _ = recipe.positions.get(where, (0, 0))
    found = error.problems if isinstance(error, PlanError) else [Problem(str(error), error.hint)]
    place = f"@ {where}" + (f", line {line}" if line else "")
    return [Problem(f"{problem.what}  {place}", problem.hint) for problem in found]
