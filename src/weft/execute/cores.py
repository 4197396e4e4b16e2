"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from weft.core.errors import WeftError


def available_threads() -> int:
    """What affinity and cgroup allow, never the host's core count."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(count, int(_cgroup_cores() or count)))


def _cgroup_cores() -> float | None:
    """The CPU quota of this process's cgroup, version 2 or 1, in cores."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        root = "/sys/fs/cgroup" + ("/cpu" if "cpu" in controllers.split(",") else "")
        for folder in {Path(root + group), Path(root)}:
            try:
                if controllers == "":
                    quota, period = (folder / "cpu.max").read_text().split()
                else:
                    quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                    period = (folder / "cpu.cfs_period_us").read_text().strip()
            except (OSError, ValueError):
                continue
            if quota not in ("max", "-1"):
                quotas.append(max(1.0, int(quota) / int(period)))
    return min(quotas, default=None)


def pick_threads(threads: int | None) -> int:
    """`threads`, or as many as there may be.

    Raises:
        WeftError: Fewer than one.
    """
    if threads is not None and threads < 1:
        raise WeftError(
            f"{threads} threads cannot work", "give 1 or more, or none for all there are"
        )
    return threads or available_threads()
