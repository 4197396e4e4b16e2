"""`weft diff`; the docstring is the command's help."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from weft.cli import console, show_diff
from weft.cli.commands import Flag, Quiet, emit, warn
from weft.core.errors import WeftError


def diff(
    a: Annotated[str, Parameter(name="A")],
    b: Annotated[str, Parameter(name="B")],
    /,
    *,
    filter: str | None = None,
    ranks: Flag = False,
    top: int = 5,
    threads: int | None = None,
    cache_dir: str | None = None,
    json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    quiet: Quiet = False,
) -> None:
    """Say which tensors of two models differ, and by how much: ‖A − B‖ / ‖B‖, max |A − B|.

    A and B are folders, files or org/name@revision, with adapters if need be: BASE+ADAPTER:0.7.
    Exit code 0: the same tensors with the same values; 1: they differ; 2: it could not be told.

    For example:

    - weft diff TUNED BASE
    - weft diff MERGED BASE+ADAPTER
    - weft diff TUNED BASE --filter self_attn,/layers.(0|1)./ --ranks

    Parameters
    ----------
    a
        A model.
    b
        The model that differences are relative to.
    filter
        Compare only tensors of these names: parts of names, globs or /regex/, in a comma list.
    ranks
        Take the stable rank of each matrix that differs, too: up to six more passes.
    top
        How many of the tensors that differ most to list.
    threads
        Without it, as many as affinity and cgroup allow.
    cache_dir
        The hub's cache, in place of the one under HF_HOME.
    json
        Print one JSON object on stdout.
    quiet
        Nothing but warnings and errors, and what --json prints: the exit code is the answer.
    """
    from weft.api.diff import diff as compare

    if top < 0:
        raise WeftError(f"--top {top} makes no sense", "0 lists none")
    with console.progress(quiet=quiet or json, doing="comparing", writes=False) as on_event:
        found = compare(
            a,
            b,
            filter=filter,
            ranks=ranks,
            threads=threads,
            cache_dir=cache_dir,
            on_event=on_event,
        )
    if json or not quiet:
        emit(show_diff.diff_as_dict(found) if json else show_diff.diff_as_text(found, top))
    warn(found.warnings)
    sys.exit(0 if found.equal else 1)
