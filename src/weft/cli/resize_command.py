"""`weft resize`; the docstring is the command's help."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from weft.cli.commands import Flag, Output, Quiet, emit, warn
from weft.core import units

if TYPE_CHECKING:
    from weft.api.resize import ResizeReport


def resize(
    adapter: str,
    *,
    output: Output,
    rank: int | None = None,
    energy: float | None = None,
    size: str | None = None,
    dtype: str | None = None,
    cache_dir: str | None = None,
    force: Flag = False,
    json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    quiet: Quiet = False,
) -> None:
    """Make an adapter's factors smaller: the best of the rank, exactly, without the base.

    One of --rank, --energy and --size says how small. ADAPTER is a LoRA of PEFT's.

    For example:

    - weft resize ADAPTER --rank 16 -o SMALLER
    - weft resize ADAPTER --energy 0.95 -o SMALLER
    - weft resize ADAPTER --size 50MB --dtype bfloat16 -o SMALLER

    Parameters
    ----------
    adapter
        A folder or org/name@revision.
    output
        Folder to create; it appears when it is complete.
    rank
        Of every module that has more.
    energy
        Keep this share of ‖ΔW‖² in each module, by the smallest rank that does.
    size
        At most so many bytes of weights, such as 50MB: ranks go where they keep most.
    dtype
        bfloat16, float16 or float32 for the factors; without it each keeps its own.
    cache_dir
        The hub's cache, in place of the one under HF_HOME.
    force
        Replace an adapter that is there, or what an interrupted run left.
    json
        Print one JSON object on stdout: output, and weft.json as manifest.
    quiet
        Nothing but warnings and errors, and what --json prints.
    """
    from weft.api.resize import resize as run

    report = run(
        adapter,
        output=output,
        rank=rank,
        energy=energy,
        size=size,
        dtype=dtype,
        force=force,
        cache_dir=cache_dir,
        command=shlex.join(["weft", *sys.argv[1:]]),
    )
    if json or not quiet:
        emit(_as_dict(report) if json else _as_text(report))
    warn(report.warnings)


def _as_dict(report: ResizeReport) -> dict[str, Any]:
    return {"schema": 1, "output": str(report.output), "manifest": report.manifest}


def _as_text(report: ResizeReport) -> str:
    ranks = [module.rank for module in report.modules]
    before = [module.before for module in report.modules]
    sizes = f"{units.show_size(report.before)} -> {units.show_size(report.nbytes)}"
    lost = f"error {units.show_share(report.relative_error)} of ‖ΔW‖"
    lines = [
        f"{report.output}: {len(ranks)} modules, rank {_range(before)} -> {_range(ranks)}, {sizes}",
        f"kept {units.show_share(report.kept)} of ‖ΔW‖², {lost}; most in",
    ]
    width = max(len(module.name) for module in report.worst)
    lines += [
        f"  {units.clean(module.name):{width}}  rank {module.before} -> {module.rank}, error "
        f"{units.show_share(module.relative_error)}"
        for module in report.worst
    ]
    return "\n".join(lines)


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
