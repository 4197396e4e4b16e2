"""What was done, and how much of it arrived: `weft.json`, and the totals that a user reads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core.specs import (
    AddDeltas,
    Checkpoint,
    Input,
    Load,
    Merge,
    Origin,
    Plan,
    Receipt,
    Rows,
    TensorJob,
    leaves,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAME = "weft.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Totals:
    """Of a whole run.

    Attributes:
        tensors: In the output.
        changed: Of which have at least one element that is not the base's.
        merged: Of which are made anew from one or several models, and compared with none.
        copied: Of which are an input's, perhaps in another dtype.
        survival: 1 − ‖(W′ − W) − ΔW‖ / ‖ΔW‖ over all tensors together; None without an update.
        worst: The tensor with the least survival, and that survival.
        relative: ‖ΔW‖ / ‖W‖ over all changed tensors together.
        nbytes: Of the output's tensors.
    """

    tensors: int
    changed: int
    merged: int
    copied: int
    survival: float | None
    worst: tuple[str, float] | None
    relative: float | None
    nbytes: int

    def __str__(self) -> str:
        """`3 of 8 tensors changed`; of what has no base to differ from, `8 of 8 tensors merged`."""
        of = f"of {self.tensors} tensors"
        if self.merged:
            return f"{self.merged} {of} merged" + (f", {self.changed} changed" * bool(self.changed))
        return (
            f"{self.copied} {of} copied"
            if self.copied == self.tensors
            else (f"{self.changed} {of} changed")
        )


def totals(plan: Plan, receipts: Mapping[str, Receipt]) -> Totals:
    """Sum up the receipts of a finished run."""
    found = [receipts[job.name] for job in plan.jobs]
    whole = Receipt(
        "",
        math.fsum(r.base or 0.0 for r in found),
        math.fsum(r.delta or 0.0 for r in found),
        math.fsum(r.error or 0.0 for r in found),
    )
    survivals = [(r.survival, r.name) for r in found if r.survival is not None]
    worst = min(survivals, default=None)
    added = sum(_takes_place(job, plan) for job in plan.jobs)
    return Totals(
        tensors=len(found),
        changed=sum(receipt.changed for receipt in found) + added,
        merged=sum(_is_merged(job) for job in plan.jobs),
        copied=sum(isinstance(job.expression, Load) for job in plan.jobs) - added,
        survival=whole.survival,
        worst=(worst[1], worst[0]) if worst else None,
        relative=whole.relative,
        nbytes=plan.nbytes,
    )


def manifest(
    plan: Plan,
    receipts: Mapping[str, Receipt],
    sums: Totals,
    *,
    operation: str = "merge",
    warnings: Sequence[str],
    version: str,
    command: str,
    seconds: float,
) -> dict[str, Any]:
    """The content of `weft.json`; every field is described in docs/reference/files.md."""
    return {
        "schema": SCHEMA,
        "weft": version,
        "operation": operation,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan": plan.hash,
        "seconds": round(seconds, 3),
        "inputs": [_input(entry) for entry in plan.inputs],
        "repairs": [str(repair) for repair in plan.repairs],
        "notes": [*plan.notes, *plan.beside],
        "warnings": list(warnings),
        "totals": {
            "tensors": sums.tensors,
            "changed": sums.changed,
            "merged": sums.merged,
            "bytes": sums.nbytes,
            "relative": sums.relative,
            "survival": sums.survival,
            "worst": dict(zip(("tensor", "survival"), sums.worst, strict=True))
            if sums.worst
            else None,
        },
        "side_files": {side.name: side.source or "written" for side in plan.side_files},
        "tensors": {job.name: _tensor(job, plan, receipts[job.name]) for job in plan.jobs},
    }


def to_text(content: dict[str, Any]) -> str:
    """The manifest as JSON with one tensor a line, so that it can be read and searched."""
    tensors = content["tensors"]
    head = json.dumps({**content, "tensors": {}}, indent=2, ensure_ascii=False)
    lines = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in tensors.items()]
    return (
        head.replace('"tensors": {}\n}', '"tensors": {\n' + ",\n".join(lines) + "\n  }\n}") + "\n"
    )


def origin(found: Checkpoint) -> Origin | None:
    """What the manifest beside `found` says; None without one, or where it is of other tensors."""
    try:
        content = json.loads(Path(found.folder, NAME).read_text(encoding="utf-8"))
        for name, ref in found.tensors.items():
            entry = content["tensors"][name]
            if (entry["dtype"], tuple(entry["shape"])) != (ref.dtype, ref.shape):
                return None
        folders: dict[str, str] = {}
        for entry in content["inputs"]:  # of each role, weights come first
            folders.setdefault(entry["role"], str(Path(entry["file"]).parent))
        survival, created = content["totals"]["survival"], content.get("created")
        return Origin(
            version=str(content["weft"]),
            created=created if created is None else str(created),
            base=folders.pop(min(folders, key=lambda role: role != "base")),  # or the first model
            adapters=tuple(folders.values()),
            survival=None if survival is None else float(survival),
            command=str(content["command"]),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # nobody needs it: it is the tensors that are inspected


def _input(entry: Input) -> dict[str, Any]:
    digests = {"header_sha256": entry.header, "sha256": entry.content}
    return {"role": entry.role, "file": entry.path, "bytes": entry.size} | {
        name: digest for name, digest in digests.items() if digest
    }


def _tensor(job: TensorJob, plan: Plan, receipt: Receipt) -> dict[str, Any]:
    entry: dict[str, Any] = {"operation": job.operation, "dtype": job.dtype, "shape": job.shape}
    roles = _roles(job, plan)
    if isinstance(job.expression, AddDeltas):
        entry["deltas"] = [
            {"kind": d.kind, "scaling": d.scaling, "weight": d.weight}
            for d in job.expression.deltas
        ]
        entry["relative"] = receipt.relative
        entry["survival"] = receipt.survival
        entry["changed"] = receipt.changed
    if isinstance(job.expression, Merge):
        entry["parameters"] = dict(job.expression.params)
        entry["inputs"] = [dict(params) for params in job.expression.each]
        if job.expression.base is not None:
            entry |= {"relative": receipt.relative, "survival": receipt.survival}
            entry["changed"] = receipt.changed
        return entry
    if "adapter" in roles or isinstance(job.expression, AddDeltas):
        entry["base"] = "adapter" if "adapter" in roles else "base"
    return entry


def _has_base(job: TensorJob) -> bool:
    """Made by a method that changes a base: its receipt says how much."""
    return isinstance(job.expression, Merge) and job.expression.base is not None


def _takes_place(job: TensorJob, plan: Plan) -> bool:
    """It is no base's tensor with something added, but one of an adapter's own."""
    return isinstance(job.expression, Load) and "adapter" in _roles(job, plan)


def _is_merged(job: TensorJob) -> bool:
    """Made by a method that has no base, or of rows in a new order."""
    return isinstance(job.expression, Merge | Rows) and not _has_base(job)


def _roles(job: TensorJob, plan: Plan) -> str:
    """`base` or `adapter`: where the tensor that the deltas are added to comes from."""
    file = leaves(job.expression)[0].file
    role = next((e.role for e in plan.inputs if e.path == file), "base")
    return role.partition(" ")[0]
