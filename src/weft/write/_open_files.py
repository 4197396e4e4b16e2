"""Room for all the files of a run: systems allow 256 or 1024 at once, unless they are asked."""

from __future__ import annotations

import resource
from pathlib import Path

from weft.core.errors import OutputError
from weft.core.specs import Plan, leaves

_SPARE = 32  # journal, folders, what torch and Python open on the way


def allow_open_files(plan: Plan) -> None:
    """Raise this process's own limit to what `plan` takes: two handles per shard and per input.

    A shard is written through the page cache by one and past it by the other; an input is read by
    one for the arithmetic, and by the other for what is copied.

    Raises:
        OutputError: The system does not allow that many.
    """
    shards = {job.shard for job in plan.jobs}
    inputs = {ref.file for job in plan.jobs for ref in leaves(job.expression)}
    needed = _open_now() + 2 * (len(shards) + len(inputs)) + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    allowed = hard == resource.RLIM_INFINITY or needed <= hard
    try:
        if allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
            return
    except (OSError, ValueError):  # macOS has a limit below what it says
        pass
    raise OutputError(
        f"{len(inputs)} input files and {len(shards)} shards take {needed} open files at once, and "
        f"the system allows {soft if allowed else hard}",
        "raise the limit (ulimit -n), or write fewer shards with a larger --max-shard-size",
    )


def _open_now() -> int:
    handles = Path("/dev/fd")
    return len(list(handles.iterdir())) if handles.is_dir() else 16
