"""What the commands about recipes print: plain strings for people, dicts for programs."""

from __future__ import annotations

import difflib
import inspect
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from weft import methods
from weft.cli import show
from weft.cli.show import SCHEMA, columns, count_of, report_as_dict, report_as_text
from weft.core.errors import WeftError
from weft.core.specs import Merge, job_bytes
from weft.core.units import show_size

if TYPE_CHECKING:
    from pathlib import Path

    from weft.api.recipes import RunPlan
    from weft.core.specs import Params

__all__ = ["report_as_dict", "report_as_text"]


def check_as_text(made: RunPlan, recipe: Path) -> str:
    """`weft run --check`."""
    found = f"{count_of(made.work.tensors, 'tensor')}, {show_size(made.work.written)}"
    return f"{recipe}: sound; {made.recipe.method} of {', '.join(made.credits)}: {found}"


def plan_as_text(made: RunPlan) -> str:
    """`weft run --dry-run`."""
    plan, work = made.plan, made.work
    shards = Counter[str]()
    for job in plan.jobs:
        shards[job.shard] += job_bytes(job)
    rows = [
        ("method", made.recipe.method),
        *(("from", given) for given in made.credits),
        ("read", f"{show_size(work.read)} from {count_of(work.files, 'file')}"),
        ("write", f"{show_size(work.written)} in {count_of(len(shards), 'shard')}"),
        ("merge", f"{work.changed} of {work.tensors} tensors, the rest are copied"),
        ("memory", f"about {show_size(work.memory)} at most"),
        ("plan", plan.hash[:16]),
    ]
    groups: Counter[tuple[str, str, str]] = Counter()
    for job in plan.jobs:
        name = re.sub(r"\.\d+\.", ".*.", job.name)
        groups[name, job.operation, _settings(job.expression)] += 1
    table = [(name, f"×{n}", what, detail) for (name, what, detail), n in groups.items()]
    notes = [*plan.notes, *plan.beside]
    lines = [*columns(rows), "", *columns(table)]
    lines += ["", *(f"note: {note}" for note in notes)] if notes else []
    return "\n".join([*lines, "", "dry run: nothing was written"])


def plan_as_dict(made: RunPlan) -> dict[str, Any]:
    """`weft run --dry-run --json`."""
    content = show.plan_as_dict(made, "run")
    for job in made.plan.jobs:
        content["tensors"][job.name]["parameters"] = _settings(job.expression)
    return content


def _settings(expression: object) -> str:
    """`weight 0.5 0.3, density 0.5 0.5, normalize true`."""
    if not isinstance(expression, Merge):
        return ""
    names = dict.fromkeys(name for params in expression.each for name, _ in params)
    parts = [
        f"{name} {' '.join(_plain(dict(params).get(name)) for params in expression.each)}"
        for name in names
    ]
    return ", ".join([*parts, *_pairs(expression.params)])


def _pairs(params: Params) -> list[str]:
    return [f"{name} {_plain(value)}" for name, value in params]


def _plain(value: object) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def methods_as_text() -> str:
    """`weft methods`."""
    rows = []
    for name in methods.names():
        own = methods.method(name)
        rows.append((name, own.USE_WHEN))
        rows += [("", f"  {_parameter(key, each)}") for key, each in own.PARAMETERS.items()]
    return "\n".join(columns(rows))


def method_as_text(name: str) -> str:
    """`weft methods NAME`."""
    own = _method(name)
    rows = [(key, _parameter(key, each)[len(key) + 1 :]) for key, each in own.PARAMETERS.items()]
    text = inspect.cleandoc(getattr(own, "__doc__", "") or "")
    least, most = own.INPUTS
    inputs = (
        f"{least} or more"
        if most is None
        else str(least)
        if least == most
        else f"{least} to {most}"
    )
    needs = {"required": "a base and", "optional": "a base or none, and", "none": "no base;"}[
        own.BASE
    ]
    return "\n".join([text, "", f"needs {needs} {inputs} models", "", *columns(rows)])


def methods_as_dict(name: str | None) -> dict[str, Any]:
    """`weft methods --json`."""
    chosen = [name] if name else methods.names()
    return {
        "schema": SCHEMA,
        "methods": {
            each: {
                "use_when": _method(each).USE_WHEN,
                "base": _method(each).BASE,
                "parameters": {
                    key: {
                        "what": own.what,
                        "type": own.type.__name__,
                        "default": own.default,
                        "required": own.required,
                        "per_model": own.each,
                        "range": own.range,
                    }
                    for key, own in _method(each).PARAMETERS.items()
                },
            }
            for each in chosen
        },
    }


def _method(name: str) -> methods.Method:
    if name not in methods.names():
        near = difflib.get_close_matches(name.lower().replace("-", "_"), methods.names(), 1, 0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        hint += f"there are: {', '.join(methods.names())}"
        raise WeftError(f"there is no merge method {name!r}", hint)
    return methods.method(name)


def _parameter(name: str, own: methods.Parameter) -> str:
    kind = "per model" if own.each else "one for all"
    default = "must be given" if own.required else f"default {_plain(own.default)}"
    within = f", {own.range}" if own.range else ""
    return f"{name} ({own.type.__name__}{within}, {kind}, {default}): {own.what}"
