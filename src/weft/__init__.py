"""Weft: the whole life of an adapter. The public names load on first use; no torch until then."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.api import MergePlan, Report, inspect, merge, plan_merge
    from weft.api.diff import diff
    from weft.api.recipes import RunPlan, plan_run, run
    from weft.api.resize import ResizeReport, resize
    from weft.core.differences import Diff
    from weft.core.errors import WeftError
    from weft.diagnosis import Diagnosis, doctor

_HOMES = {
    "Diff": "weft.core.differences",
    "Diagnosis": "weft.diagnosis",
    "MergePlan": "weft.api",
    "Report": "weft.api",
    "ResizeReport": "weft.api.resize",
    "RunPlan": "weft.api.recipes",
    "WeftError": "weft.core.errors",
    "diff": "weft.api.diff",
    "doctor": "weft.diagnosis",
    "inspect": "weft.api",
    "merge": "weft.api",
    "plan_merge": "weft.api",
    "plan_run": "weft.api.recipes",
    "resize": "weft.api.resize",
    "run": "weft.api.recipes",
}
__all__ = [
    "Diagnosis",
    "Diff",
    "MergePlan",
    "Report",
    "ResizeReport",
    "RunPlan",
    "WeftError",
    "diff",
    "doctor",
    "inspect",
    "merge",
    "plan_merge",
    "plan_run",
    "resize",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
