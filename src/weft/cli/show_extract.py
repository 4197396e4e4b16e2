"""What `weft extract` prints: plain strings for people, dicts for programs."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from weft.cli.show import SCHEMA, columns, count_of
from weft.core.units import show_share, show_size, show_time

if TYPE_CHECKING:
    from weft.api.extract import ExtractPlanned, ExtractReport
    from weft.plan.extract import Change


def report_as_text(report: ExtractReport) -> str:
    """The last lines of `weft extract`."""
    content = report.manifest
    totals, modules = content["totals"], content["modules"]
    saved = f", {count_of(totals['saved'], 'tensor')} in full" if totals["saved"] else ""
    same = f"; {count_of(totals['unchanged'], 'tensor')} did not change"
    resumed = f", {report.resumed} tensors were read already" if report.resumed else ""
    error = show_share(totals["relative_error"])
    of_model = show_share(totals["model_error"])
    lines = [
        f"{count_of(totals['modules'], 'module')}{_ranks(modules)}{saved}{same}",
        f"{show_size(totals['bytes'])} in {report.output}, {show_time(report.seconds)}{resumed}",
        f"{show_share(totals['kept'])} of ‖ΔW‖² kept; error {error} of ‖ΔW‖, {of_model} of ‖W‖"
        + _not_counted(content),
    ]
    if content["worst"]:
        rows = [("largest errors", "rank", "kept", "error", "above noise")]
        rows += [
            (
                name,
                str(modules[name]["rank"]),
                show_share(modules[name]["kept"]),
                show_share(modules[name]["relative_error"]),
                show_share(modules[name]["noise"]["kept_above"]),
            )
            for name in content["worst"]
        ]
        lines += ["", *columns(rows)]
    lines += ["", f"loads in {content['serving']}"]
    return "\n".join(lines)


def _not_counted(content: dict[str, Any]) -> str:
    """What is left as in the base and has no ΔW: the base lacks it, or in this shape."""
    count = sum(each["norm"] is None for each in content["left_out"].values())
    return f"; not counted: {count_of(count, 'tensor')} left out without a ΔW" if count else ""


def _ranks(modules: dict[str, Any]) -> str:
    ranks = [module["rank"] for module in modules.values()]
    if not ranks:
        return ""
    least, most = min(ranks), max(ranks)
    return f" of rank {least}" if least == most else f" of ranks {least} to {most}"


def report_as_dict(report: ExtractReport) -> dict[str, Any]:
    """`weft extract --json`."""
    return {
        "schema": SCHEMA,
        "output": str(report.output),
        "seconds": round(report.seconds, 3),
        "resumed": report.resumed,
        "manifest": report.manifest,
    }


def plan_as_text(planned: ExtractPlanned) -> str:
    """`weft extract --dry-run`."""
    plan = planned.plan
    read = sum(entry.size for entry in plan.reads.inputs)
    rows = [
        ("base", plan.base_model),
        ("ranks", str(plan.wishes.rule)),
        ("factors", plan.dtype),
        ("read", show_size(read)),
        ("plan", plan.reads.hash[:16]),
    ]
    groups: Counter[tuple[str, str, str]] = Counter()
    for change in plan.changes:
        groups[re.sub(r"\.\d+\.", ".*.", change.path), _action(change), change.why] += 1
    table = [(name, f"×{n}", what, why) for (name, what, why), n in groups.items()]
    notes = ["", *(f"note: {note}" for note in plan.notes)] if plan.notes else []
    end = "dry run: nothing was read or written; what did not change is left out of the adapter"
    return "\n".join([*columns(rows), "", *columns(table), *notes, "", end])


def plan_as_dict(planned: ExtractPlanned) -> dict[str, Any]:
    """`weft extract --dry-run --json`."""
    plan = planned.plan
    return {
        "schema": SCHEMA,
        "operation": "extract",
        "plan": plan.reads.hash,
        "rule": str(plan.wishes.rule),
        "dtype": plan.dtype,
        "tensors": {
            change.path: {"action": change.action, "kind": change.form.kind, "why": change.why}
            for change in plan.changes
        },
        "notes": list(plan.notes),
        "warnings": list(planned.warnings),
    }


def _action(change: Change) -> str:
    if change.action == "decompose":
        rank = f", rank {change.rank}" if change.rank else ""
        return f"decompose ({change.form.kind}){rank}"
    return {"save": "save in full", "leave": "leave"}[change.action]
