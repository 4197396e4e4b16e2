"""Commands about recipes, one typed function each; the docstring is the command's help."""

from __future__ import annotations

import json as json_module
import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from weft.cli import console, show_extract, show_recipes
from weft.cli.commands import Flag, Output, Quiet, emit, warn

Json = Annotated[bool, Parameter(name="--json", negative=())]


def run(
    recipe: Path,
    *,
    output: Output | None = None,
    seed: int = 0,
    max_shard_size: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    cache_dir: str | None = None,
    tensor_union: Annotated[bool, Parameter(("--tensor-union", "-u"), negative=())] = False,
    tensor_intersection: Annotated[
        bool, Parameter(("--tensor-intersection", "-i"), negative=())
    ] = False,
    check: Flag = False,
    dry_run: Flag = False,
    force: Flag = False,
    resume: Flag = False,
    lora_merge_cache: Annotated[str | None, Parameter(show=False)] = None,
    lora_merge_dtype: Annotated[str | None, Parameter(show=False)] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the model that a MergeKit recipe describes: one pass, float32, one rounding.

    Or the adapter that an extraction recipe asks for (finetune, base_model, rank): weft extract.

    RECIPE is a MergeKit YAML file, as it is; a model in it may be model+adapter, with several
    adapters and weights too: model+a:0.7+b:0.3.

    For example:

    - weft run recipe.yml -o OUT
    - weft run recipe.yml --check
    - weft run recipe.yml -o OUT --dry-run

    Parameters
    ----------
    recipe
        A YAML file; several documents in it may name each other.
    output
        Folder to create; it appears when it is complete.
    seed
        Of the methods that draw at random (DARE, DELLA).
    max_shard_size
        Such as 5GB; without it the shards are those of the base where they fit, else 5 GB each.
    threads
        Without it, as many as affinity and cgroup allow.
    device
        cpu, cuda or cuda:N, where the arithmetic is done.
    cache_dir
        The hub's cache, in place of the one under HF_HOME.
    tensor_union
        A tensor that one of the models lacks is made of the others.
    tensor_intersection
        A tensor that one of the models lacks is left out; without either it is an error.
    check
        Say whether the recipe and its models are sound; read no weight, write nothing.
    dry_run
        Print what would be read, merged and written, and the memory it takes; touch nothing.
    force
        Replace an output that is there, or start over an interrupted one.
    resume
        Finish an interrupted run.
    json
        Print one JSON object on stdout.
    quiet
        Nothing but warnings and errors, and what --json prints.
    """
    from weft.api import recipes
    from weft.api.extract import ExtractPlanned, ExtractReport
    from weft.core.errors import WeftError

    _ignored(lora_merge_cache, lora_merge_dtype)
    if tensor_union and tensor_intersection:
        raise WeftError("--tensor-union and --tensor-intersection", "one of them")
    tensors = "union" if tensor_union else "intersection" if tensor_intersection else "same"
    if check or dry_run:
        made = recipes.plan_run(
            recipe,
            output=None if check else output,
            seed=seed,
            max_shard_size=max_shard_size,
            tensors=tensors,
            threads=threads,
            device=device,
            force=force,
            resume=resume,
            cache_dir=cache_dir,
        )
        if isinstance(made, ExtractPlanned):
            checked = f"{recipe}: sound; an adapter, {made.plan.wishes.rule}"
            shown = show_extract.plan_as_dict(made) if json else show_extract.plan_as_text(made)
            notes = made.plan.notes
        else:
            checked = show_recipes.check_as_text(made, recipe)
            shown = show_recipes.plan_as_dict(made) if json else show_recipes.plan_as_text(made)
            notes = (*made.plan.notes, *made.plan.beside)
        if check and not json and not quiet:
            for note in notes:
                console.say("note", note)
            emit(checked)
        elif json or not quiet:
            emit(shown)
        warn(made.warnings)
        return
    if output is None:
        raise WeftError("no output given", f"weft run {recipe} -o OUT, or --check")
    with console.progress(quiet=quiet or json) as on_event:
        report = recipes.run(
            recipe,
            output=output,
            seed=seed,
            max_shard_size=max_shard_size,
            tensors=tensors,
            threads=threads,
            device=device,
            force=force,
            resume=resume,
            cache_dir=cache_dir,
            command=shlex.join(["weft", *sys.argv[1:]]),
            on_event=on_event,
        )
    if isinstance(report, ExtractReport):
        shown = show_extract.report_as_dict(report) if json else show_extract.report_as_text(report)
    else:
        shown = show_recipes.report_as_dict(report) if json else show_recipes.report_as_text(report)
    if json or not quiet:
        emit(shown)
    warn(report.warnings)


def methods(name: str | None = None, *, json: Json = False) -> None:
    """List the merge methods with their parameters, or describe one of them.

    Parameters
    ----------
    name
        One method, with its formula and source.
    json
        Print one JSON object on stdout.
    """
    if json:
        emit(show_recipes.methods_as_dict(name))
    else:
        emit(show_recipes.method_as_text(name) if name else show_recipes.methods_as_text())


def schema() -> None:
    """Print the JSON Schema of recipes, for editors that check YAML while it is written."""
    from weft.recipes.schema import json_schema

    print(json_module.dumps(json_schema(), indent=2))


def _ignored(cache: str | None, dtype: str | None) -> None:
    if cache is not None:
        console.say("note", "--lora-merge-cache is not needed: adapters are merged as they stream")
    if dtype is not None:
        console.say("note", "--lora-merge-dtype is not needed: ΔW is float32 and rounded once")
