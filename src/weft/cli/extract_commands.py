"""`weft extract`; its docstring is its help."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from weft.cli import console, show_extract
from weft.cli.commands import Flag, Output, Quiet, emit, warn
from weft.cli.recipe_commands import Json
from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Sequence


def extract(
    tuned: str,
    *,
    base: str,
    output: Output | None = None,
    rank: Annotated[list[str] | None, Parameter(negative=())] = None,
    energy: float | None = None,
    size: str | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
    target: str | None = None,
    save: str | None = None,
    exclude: str | None = None,
    embed: str | None = None,
    uniform_rank: Flag = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    cache_dir: str | None = None,
    dry_run: Flag = False,
    force: Flag = False,
    resume: Flag = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take an adapter out of a tuned model: for every matrix the best of its rank, and its error.

    TUNED and --base are what weft merge takes as BASE, model+adapter:0.7 too. Filters are comma
    lists of parts of names (self_attn, mlp), globs (`*norm*`) or /regular expressions/.

    For example:

    - weft extract TUNED --base BASE -o ADAPTER --rank 64
    - weft extract TUNED --base BASE -o ADAPTER --rank auto
    - weft extract TUNED --base BASE -o ADAPTER --rank 32 --rank q_proj,k_proj=64
    - weft extract TUNED --base BASE -o ADAPTER --size 50MB

    Parameters
    ----------
    tuned
        The model that was tuned.
    base
        The model that it was tuned from.
    output
        Folder to create; it appears when it is complete.
    rank
        Of every module (32 if nothing is said), or auto: what stands above the noise of rounding.
        Again with a filter before it, for modules of their own: --rank q_proj=64. The first filter
        that fits counts.
    energy
        In place of it, such as 0.95: the smallest rank per module that keeps so much of ‖ΔW‖².
    size
        In place of it, such as 50MB: the best ranks for which the weights' file is no larger.
    alpha
        lora_alpha of all modules; without it each module's rank, and so a scaling of 1.
    dtype
        bfloat16, float16 or float32 for the factors; without it the base's.
    target
        Filter: only these are decomposed.
    save
        Filter: these are saved in full.
    exclude
        Filter: these stay as they are in the base.
    embed
        lora, save or skip, for embedding and head; without it the smaller of the first two, and a
        tied table in full.
    uniform_rank
        One rank for all and nothing saved in full, as serving engines want it.
    seed
        Of the random vectors.
    threads
        Without it, as many as affinity and cgroup allow; the bits do not depend on it.
    device
        cpu, cuda or cuda:N, where matrices are multiplied.
    cache_dir
        The hub's cache, in place of the one under HF_HOME.
    dry_run
        Print what would become of every tensor if all changed; read no weight, write nothing.
    force
        Replace an adapter that is there, or start over an interrupted run.
    resume
        Finish an interrupted run.
    json
        Print one JSON object on stdout: output, seconds, resumed, and weft.json as manifest.
    quiet
        Nothing but warnings and errors, and what --json prints.
    """
    from weft.api import extract as api
    from weft.core.wishes import wishes_of

    common, own = _ranks(rank or ())
    wishes = wishes_of(
        rank=common,
        ranks=own,
        energy=energy,
        size=size,
        alpha=alpha,
        dtype=dtype,
        target=target,
        save=save,
        exclude=exclude,
        embed=embed,
        uniform_rank=uniform_rank,
        seed=seed,
    )
    if dry_run:
        planned = api.plan_extraction(
            tuned,
            base,
            wishes,
            output=output,
            threads=threads,
            device=device,
            force=force,
            resume=resume,
            cache_dir=cache_dir,
        )
        if json or not quiet:
            emit(show_extract.plan_as_dict(planned) if json else show_extract.plan_as_text(planned))
        warn(planned.warnings)
        return
    if output is None:
        raise WeftError("no output given", f"weft extract {tuned} --base {base} -o ADAPTER")
    with console.progress(quiet=quiet or json, doing="extracting", writes=False) as on_event:
        report = api.run_extraction(
            tuned,
            base,
            wishes,
            output=output,
            threads=threads,
            device=device,
            force=force,
            resume=resume,
            cache_dir=cache_dir,
            command=shlex.join(["weft", *sys.argv[1:]]),
            on_event=on_event,
        )
    if json or not quiet:
        emit(show_extract.report_as_dict(report) if json else show_extract.report_as_text(report))
    warn(report.warnings)


def _ranks(given: Sequence[str]) -> tuple[str | None, list[tuple[str, int]]]:
    """The rank of all modules, if one is given, and the filters that have one of their own.

    Raises:
        WeftError: Two for all, or something else than a number behind a filter.
    """
    common = [text for text in given if "=" not in text]
    if len(common) > 1:
        raise WeftError(
            f"--rank {' and --rank '.join(common)}: one of them is the rank of every module",
            f"a filter before the other, such as --rank q_proj={common[-1]}",
        )
    own = []
    for text in given:
        names, is_own, rank = text.rpartition("=")
        if not is_own:
            continue
        if not names.strip() or not rank.strip().isdecimal():
            raise WeftError(
                f"--rank {text} is no filter with a number behind it", "such as --rank q_proj=64"
            )
        own.append((names, int(rank)))
    return (common[0] if common else None), own
