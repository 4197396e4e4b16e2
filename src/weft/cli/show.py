"""Records -> text for people and dicts for programs; plain strings, readable without colour."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core.specs import Adapter, AdapterEntry, AddDeltas, Checkpoint, TensorJob, job_bytes
from weft.core.units import clean, show_count, show_share, show_size, show_survival, show_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from weft.api import MergePlan, Report
    from weft.api.recipes import RunPlan
    from weft.demo import Demo
    from weft.diagnosis import Diagnosis

SCHEMA = 1
# Kinds whose A has as many rows as their rank, or as that of all their parts.
_LOW_RANK = ("lora", "dora", "kasa", "qalora", "bdlora", "merged_lora")


def report_as_text(report: Report) -> str:
    """The last lines of `weft merge`."""
    sums = report.totals
    read = sum(e["bytes"] for e in report.manifest["inputs"] if "adapter" not in e["role"])
    rate = read / report.seconds / 1e9 if report.seconds else 0.0
    resumed = f", {report.resumed} tensors were there already" if report.resumed else ""
    lines = [
        f"{sums}, {show_size(sums.nbytes)} in {report.output}",
        f"{show_time(report.seconds)}, {rate:.2f} GB/s of the input{resumed}",
    ]
    if sums.survival is not None and sums.worst:
        lines.append(
            f"‖ΔW‖/‖W‖ {show_share(sums.relative)}, survival {show_survival(sums.survival)}, "
            f"worst {show_survival(sums.worst[1])} in {sums.worst[0]}"
        )
    return "\n".join(lines)


def report_as_dict(report: Report) -> dict[str, Any]:
    """`weft merge --json`: what is true of this run alone, and `weft.json` as it was written."""
    return {
        "schema": SCHEMA,
        "output": str(report.output),
        "seconds": round(report.seconds, 3),
        "resumed": report.resumed,
        "manifest": report.manifest,
    }


def demo_as_text(found: Demo) -> str:
    """What `weft demo` prints."""
    lines = [f"base     {found.base}", f"adapter  {found.adapter}"]
    for said in found.answers:
        rows = [
            ("  base", _one_line(said.base)),
            ("  base + adapter, unmerged (PEFT)", _one_line(said.unmerged)),
            ("  merged by weft", _one_line(said.merged)),
        ]
        lines += ["", said.question, *columns(rows)]
    same = sum(said.unmerged == said.merged for said in found.answers)
    agreement = f"same first token at {show_share(found.agreement)} of the positions"
    lines += [
        "",
        f"unmerged against merged: {same} of {len(found.answers)} answers equal, {agreement}",
        f"largest difference of a logit {found.logits:.3f}, with a spread of {found.spread:.2f}",
        "",
        report_as_text(found.report),
    ]
    return "\n".join(lines)


def _one_line(text: str, width: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


# ------------------------------------------------------------------------------------------ plans


def plan_as_text(made: MergePlan, output: Path) -> str:
    """What `weft merge --dry-run` prints."""
    plan, work = made.plan, made.work
    base = made.inputs.base
    rows = [
        ("base", f"{base.given} ({show_size(base.nbytes)}, {count_of(len(base.shards), 'shard')})")
    ]
    for adapter, weight in made.inputs.adapters:
        rows.append(("adapter", f"{adapter.given} ({_adapter_line(adapter)}), weight {weight:g}"))
    shards = Counter[str]()
    for job in plan.jobs:
        shards[job.shard] += job_bytes(job)
    rows += [
        ("read", f"{show_size(work.read)} from {count_of(work.files, 'file')}"),
        ("write", f"{show_size(work.written)} in {count_of(len(shards), 'shard')} to {output}"),
        ("change", f"{work.changed} of {work.tensors} tensors"),
        ("memory", f"about {show_size(work.memory)} at most"),
        ("plan", plan.hash[:16]),
    ]
    lines = columns(rows)
    changed = [job for job in plan.jobs if not job.is_copy]
    if changed:
        lines += ["", *columns(_grouped(changed))]
    notes = [*plan.notes, *plan.beside]
    lines += ["", *(f"note: {note}" for note in notes)] if notes else []
    return "\n".join([*lines, "", "dry run: nothing was written"])


def plan_as_dict(made: MergePlan | RunPlan, operation: str = "merge") -> dict[str, Any]:
    """`weft merge --dry-run --json`, and what `weft run` has in common with it."""
    plan, work = made.plan, made.work
    return {
        "schema": SCHEMA,
        "operation": operation,
        "plan": plan.hash,
        "read_bytes": work.read,
        "write_bytes": work.written,
        "memory_bytes": work.memory,
        "tensors": {
            job.name: {
                "operation": job.operation,
                "dtype": job.dtype,
                "shape": job.shape,
                "shard": job.shard,
            }
            for job in plan.jobs
        },
        "side_files": {side.name: side.source or "written" for side in plan.side_files},
        "notes": [*plan.notes, *plan.beside],
        "warnings": list(made.warnings),
    }


def _grouped(jobs: Iterable[TensorJob]) -> list[tuple[str, ...]]:
    """Jobs that differ by the layer's number alone, on one line."""
    groups: dict[tuple[str, str, str], int] = defaultdict(int)
    for job in jobs:
        detail = ""
        if isinstance(job.expression, AddDeltas):
            detail = ", ".join(
                f"scaling {d.scaling:g}" + (f" weight {d.weight:g}" if d.weight != 1 else "")
                if d.kind
                in (*_LOW_RANK, "lora_bias", "lora_experts", "lora_expert", "lora_stacked")
                else f"weight {d.weight:g}"
                for d in job.expression.deltas
            )
        groups[re.sub(r"\.\d+\.", ".*.", job.name), job.operation, detail] += 1
    return [(name, f"×{n}", operation, detail) for (name, operation, detail), n in groups.items()]


# ------------------------------------------------------------------------------------ inspections


def inspection_as_text(found: Checkpoint | Adapter) -> str:
    """What `weft inspect` prints."""
    rows = _adapter_rows(found) if isinstance(found, Adapter) else _checkpoint_rows(found)
    return "\n".join(columns([(key, value) for key, value in rows if value]))


def inspection_as_dict(found: Checkpoint | Adapter) -> dict[str, Any]:
    """`weft inspect --json`."""
    common = {
        "schema": SCHEMA,
        "path": _path(found),
        "bytes": sum(ref.nbytes for ref in found.tensors.values()),
        "parameters": sum(ref.numel for ref in found.tensors.values()),
        "dtypes": _dtypes(found),
        "tensors": {
            ref.name: {"dtype": ref.dtype, "shape": ref.shape, "file": Path(ref.file).name}
            for ref in found.tensors.values()
        },
    }
    if isinstance(found, Checkpoint):
        return {
            "kind": "base",
            **common,
            "architectures": found.config.get("architectures"),
            "shards": list(found.shards),
            "tied": found.config.get("tie_word_embeddings"),
            "side_files": list(found.side_files),
            "origin": asdict(found.origin) if found.origin else None,
        }
    return {
        "kind": "adapter",
        **common,
        "peft_type": found.kind,
        "format": found.format,
        "base_model": found.base_model,
        "ranks": sorted(_ranks(found)),
        "scalings": sorted(_scalings(found)),
        "modules": {entry.target: entry.kind for entry in found.entries},
        "notes": list(found.notes),
        "obstacles": [{"what": each.what, "hint": each.hint} for each in found.obstacles],
    }


def diagnosis_as_text(found: Diagnosis) -> str:
    """What `weft doctor` prints: the adapter, what was found, and the verdict last."""
    lines = []
    if found.adapter is not None:
        lines += [inspection_as_text(replace(found.adapter, notes=(), obstacles=())), ""]
    for level, what, cure in _alike((f.level, f.what, f.cure) for f in found.findings):
        lines.append(f"{level:8}  {clean(what)}")
        if cure:
            lines.append(f"{'':8}  -> {clean(cure)}")
    fits = f", and fits {found.base}" if found.plan else ""
    alone = "" if found.base else " in itself; --base BASE says whether it fits"
    verdict = {
        "sound": f"{found.given} is sound{alone}{fits}",
        "problems": f"{found.given} can be merged{fits}; see above",
        "unusable": f"{found.given} cannot be merged{f' into {found.base}' if found.base else ''}",
    }[found.verdict]
    return "\n".join([*lines, *([""] if found.findings else []), verdict])


def _alike(said: Iterable[tuple[str, str, str | None]]) -> list[tuple[str, str, str | None]]:
    """(level, what, cure); what is the same in every layer is one line."""
    found: dict[tuple[str, str, str | None], list[str]] = defaultdict(list)
    for level, what, cure in said:
        found[level, re.sub(r"(?<=[._])\d+(?=[._])", "*", what), cure].append(what)
    return [
        (level, first + (f" (and {len(others)} more like it)" if others else ""), cure)
        for (level, _, cure), (first, *others) in found.items()
    ]


def diagnosis_as_dict(found: Diagnosis) -> dict[str, Any]:
    """`weft doctor --json`."""
    return {
        "schema": SCHEMA,
        "given": found.given,
        "verdict": found.verdict,
        "base": found.base,
        "fits": True if found.plan is not None else None,
        "findings": [asdict(finding) for finding in found.findings],
        "rewritten": list(found.rewritten),
        "adapter": None if found.adapter is None else inspection_as_dict(found.adapter),
    }


def _checkpoint_rows(found: Checkpoint) -> list[tuple[str, str]]:
    config = found.config
    names = ", ".join(config.get("architectures") or [])
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    hidden = config.get("hidden_size") or config.get("n_embd")
    shape = f"{layers} layers, hidden {hidden}" if layers and hidden else ""
    quantised = config.get("quantization_config") or {}
    parameters = show_count(sum(ref.numel for ref in found.tensors.values()))
    tied = config.get("tie_word_embeddings")
    return [
        ("kind", "base model"),
        ("path", _path(found)),
        ("model", f"{names or 'no config.json'}{', ' + shape if shape else ''}"),
        ("size", f"{parameters} parameters, {show_size(found.nbytes)}"),
        ("tensors", f"{len(found.tensors)} in {count_of(len(found.shards), 'shard')}"),
        ("dtypes", _dtype_line(found)),
        ("vocabulary", f"{config['vocab_size']} rows" if "vocab_size" in config else ""),
        ("embeddings", "" if tied is None else "tied" if tied else "separate"),
        ("quantised", str(quantised.get("quant_method", "yes")) if quantised else ""),
        ("beside", ", ".join(found.side_files)),
        ("left out", ", ".join(found.left_out)),
        *_origin_rows(found),
    ]


def _path(found: Checkpoint | Adapter) -> str:
    """The folder, or the one file in it that was asked for."""
    given = Path(found.given).expanduser()
    return str(given.absolute()) if given.is_file() else found.folder


def _origin_rows(found: Checkpoint) -> list[tuple[str, str]]:
    made = found.origin
    if made is None:
        return []
    when = f" at {made.created}" if made.created else ""
    kept = "" if made.survival is None else f", survival {show_survival(made.survival)}"
    return [
        ("merged by", f"weft {made.version}{when}{kept}"),
        ("from", " + ".join([made.base, *made.adapters])),
    ]


def _adapter_rows(found: Adapter) -> list[tuple[str, str]]:
    config = found.config
    modules: dict[tuple[str, str], list[str]] = defaultdict(list)
    dot = "_" if found.flattened else r"\."
    for entry in found.entries:
        leaf = entry.module.rpartition(".")[2]
        leaf = re.sub(r"(?<=_)\d+(?=_)", "*", leaf) if found.flattened else leaf
        modules[f"{leaf}.{entry.parameter}", entry.kind].append(entry.module)
    targets = [f"{name} ×{len(paths)} ({kind})" for (name, kind), paths in modules.items()]
    numbered = [re.search(rf"{dot}(\d+){dot}", entry.module) for entry in found.entries]
    layers = {int(number[1]) for number in numbered if number}
    parameters = show_count(sum(ref.numel for ref in found.tensors.values()))
    size = show_size(sum(ref.nbytes for ref in found.tensors.values()))
    return [
        ("kind", f"adapter, {_adapter_line(found)}"),
        ("path", _path(found)),
        ("base", (found.base_model or "not named") + _at(found.revision)),
        ("task", str(config.get("task_type") or "")),
        ("size", f"{parameters} parameters, {size}"),
        ("tensors", f"{len(found.tensors)} in {', '.join(Path(f).name for f in found.files[:1])}"),
        ("dtypes", _dtype_line(found)),
        ("changes", ", ".join(targets)),
        ("layers", f"{len(layers)} ({min(layers)} to {max(layers)})" if layers else ""),
        ("written by", _writer(found)),
        ("beside", ", ".join(found.side_files)),
        ("left out", ", ".join(found.left_out)),
        *(("note", note) for note in found.notes),
        *(row[:2] for row in _alike(("not merged", o.what, None) for o in found.obstacles)),
    ]


def _writer(adapter: Adapter) -> str:
    version = adapter.config.get("peft_version")
    return f"PEFT {version}" if version else adapter.format * (adapter.format != "PEFT")


def _adapter_line(adapter: Adapter) -> str:
    config = adapter.config
    kind = adapter.kind + (" with DoRA" if adapter.kind == "LORA" and _has_dora(adapter) else "")
    kind += " (rsLoRA)" if config.get("use_rslora") else ""
    ranks, scalings = sorted(_ranks(adapter)), sorted(_scalings(adapter))
    parts = [kind]
    if ranks:
        parts.append(f"rank {_range(ranks)}")
        parts += [f"alpha {config['lora_alpha']}"] if "lora_alpha" in config else []
        parts.append(f"scaling {_range(scalings)}")
    elif not adapter.entries and type(config.get("r")) is int:
        parts.append(f"rank {config['r']}")
    return ", ".join(parts)


def _has_dora(adapter: Adapter) -> bool:
    return any(entry.kind == "dora" for entry in adapter.entries)


def _ranks(adapter: Adapter) -> set[int]:
    return {_rank(entry) for entry in adapter.entries if entry.kind in _LOW_RANK}


def _rank(entry: AdapterEntry) -> int:
    A, params = dict(entry.tensors)["A"], dict(entry.params)
    parts = params.get("parts", ())
    rows = A.shape[1 if params.get("factors_transposed") else 0]
    return rows // int(sum(parts)) if isinstance(parts, tuple) and parts else rows


def _scalings(adapter: Adapter) -> set[float]:
    return {entry.scaling for entry in adapter.entries if entry.kind in _LOW_RANK}


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _dtypes(found: Checkpoint | Adapter) -> dict[str, int]:
    sizes = Counter[str]()
    for ref in found.tensors.values():
        sizes[ref.dtype] += ref.nbytes
    return dict(sizes.most_common())


def _dtype_line(found: Checkpoint | Adapter) -> str:
    return ", ".join(f"{dtype} {show_size(size)}" for dtype, size in _dtypes(found).items())


def _at(revision: str | None) -> str:
    return f"@{revision}" if revision else ""


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    rows = [tuple(map(clean, row)) for row in rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
