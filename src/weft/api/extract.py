"""`weft.extract`: a tuned model − its base -> an adapter, and how near it comes."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.api._execution import check_place, nothing_to_resume, setting, unchanged
from weft.api._models import Models, named
from weft.core import events, units
from weft.core.errors import OutputError, WeftError
from weft.core.lazy import load_torch
from weft.core.wishes import wishes_of
from weft.plan.extract import Change, ExtractPlan, plan_extract

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weft.core.specs import Receipt
    from weft.core.wishes import Wishes
    from weft.plan._adapter_form import Entry
    from weft.write.scratch import Scratch


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What `extract` did.

    Attributes:
        output: The folder.
        seconds: Of work.
        resumed: Tensors that an earlier, interrupted run had read.
        manifest: The content of `weft.json`.
        warnings: What the user should know before using the output.
    """

    output: Path
    seconds: float
    resumed: int
    manifest: dict[str, Any] = field(repr=False)
    warnings: tuple[str, ...]


def extract(
    tuned: str | Path,
    *,
    base: str | Path,
    output: str | Path,
    rank: int | str | None = None,
    ranks: Sequence[tuple[str, int]] = (),
    energy: float | None = None,
    size: str | int | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
    target: str | None = None,
    save: str | None = None,
    exclude: str | None = None,
    embed: str | None = None,
    uniform_rank: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    cache_dir: str | None = None,
    command: str | None = None,
    on_event: events.OnEvent = events.ignore,
) -> ExtractReport:
    """Write an adapter that leads from `base` to `tuned`: for each matrix the best of its rank.

    Both may be whatever weft reads, `model+adapter:0.7` too. At most one of `rank`, `energy` and
    `size` says how large it gets.

    Args:
        tuned: The model that was tuned.
        base: The one that it was tuned from.
        output: Folder to create.
        rank: Of every module, 32 if nothing is said; `auto` separates what was learnt from the
            noise of rounding.
        ranks: Filters of modules with a rank of their own, and that rank.
        energy: The smallest rank per module that keeps this share of ‖ΔW‖², such as 0.95.
        size: The best ranks for which the weights' file has at most so many bytes, such as `50MB`.
        alpha: Of all modules; None makes it each one's rank.
        dtype: `bfloat16`, `float16` or `float32` for the factors; None takes the base's.
        target: Filter of what is decomposed; None takes all that changed.
        save: Filter of what is saved in full.
        exclude: Filter of what is left as it is in the base.
        embed: `lora`, `save` or `skip`, for embedding and head; None takes the smaller of the
            first two, and saves a tied table in full.
        uniform_rank: One rank for all modules, and nothing saved in full.
        seed: Of the random vectors.
        threads: None takes what affinity and cgroup allow; the bits do not depend on it.
        device: `cpu`, `cuda` or `cuda:1`, where matrices are multiplied.
        force: Replace an adapter that is there already.
        resume: Finish an interrupted run.
        cache_dir: The hub's cache, in place of HF_HOME's.
        command: What the card and the manifest quote; None writes the Python call.
        on_event: Called with progress, from several threads.

    Raises:
        WeftError: See `weft.core.errors`; the output is not there, and `resume` may finish it.
    """
    asked = wishes_of(
        rank=rank, ranks=ranks, energy=energy, size=size, alpha=alpha, dtype=dtype, target=target,
        save=save, exclude=exclude, embed=embed, uniform_rank=uniform_rank, seed=seed,
    )  # fmt: skip
    call = f"weft.extract({str(tuned)!r}, base={str(base)!r}, output={str(output)!r})"
    return run_extraction(
        str(tuned),
        str(base),
        asked,
        output=Path(output),
        threads=threads,
        device=device,
        force=force,
        resume=resume,
        cache_dir=cache_dir,
        command=command or call,
        on_event=on_event,
    )


@dataclass(frozen=True, slots=True)
class ExtractPlanned:
    """What `extract` would do, if everything changed.

    Attributes:
        plan: Tensor by tensor.
        threads: That would compute.
        warnings: What the user should know.
    """

    plan: ExtractPlan
    threads: int
    warnings: tuple[str, ...]


def plan_extraction(
    tuned: str,
    base: str,
    wishes: Wishes,
    *,
    output: Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    cache_dir: str | None = None,
) -> ExtractPlanned:
    """What `run_extraction` would do with these arguments; reads headers and configs.

    Raises:
        WeftError: What it would stop at before it reads a weight.
    """
    from weft.write.scratch import check_place as check_output

    count = check_place(device, threads)
    models = Models(cache_dir, dequantise=True)
    plan = _plan(models, tuned, base, wishes)
    if output is not None:
        check_output(output, plan.reads, force=force, resume=resume)
    tight = _tight(plan, output) if output is not None and not resume else ()
    return ExtractPlanned(plan, count, (*models.examine(), *plan.warnings, *tight))


def _tight(plan: ExtractPlan, output: Path) -> tuple[str, ...]:
    """A warning, if the disk may be too small; what changed is not known before all is read."""
    from weft.execute.choose import most_bytes
    from weft.write.checkpoint import existing

    above = existing(output.absolute().parent)
    free, most = shutil.disk_usage(above).free, most_bytes(plan.changes, plan.wishes)
    if most <= free:
        return ()
    what = f"if every tensor changed, this takes {units.show_size(most)} while it is made"
    return (f"{above} has {units.show_size(free)} free; {what}",)


def _plan(models: Models, tuned: str, base: str, wishes: Wishes) -> ExtractPlan:
    name = named(base)
    return plan_extract(models.view(named(tuned)), models.view(name), wishes, name.revision)


def run_extraction(
    tuned: str,
    base: str,
    wishes: Wishes,
    *,
    output: Path,
    threads: int | None,
    device: str,
    force: bool,
    resume: bool,
    cache_dir: str | None,
    command: str,
    on_event: events.OnEvent,
) -> ExtractReport:
    """As `extract`, with wishes that are checked.

    Raises:
        WeftError: See `weft.core.errors`.
    """
    from weft.write.scratch import Scratch

    begin = time.perf_counter()
    count = check_place(device, threads)
    models = Models(cache_dir, dequantise=True)
    plan = _plan(models, tuned, base, wishes)
    warnings = (*models.examine(), *plan.warnings, *(() if resume else _tight(plan, output)))
    for note in plan.notes:
        on_event(events.Noted(note))
    names = [change.name for change in plan.changes if change.is_read]
    scratch = Scratch(
        output, plan.reads, names, force=force, resume=resume, setting=setting(device)
    )
    try:
        resumed = len(scratch.receipts)
        if resume and not resumed:
            on_event(nothing_to_resume(scratch.folder))
        ranks = _decompose(plan, scratch, count, device, on_event)
        manifest = _write(
            plan, scratch, ranks, output, threads=count, command=command, warnings=warnings,
            begin=begin, force=force, tuned=tuned, base=base,
        )  # fmt: skip
        scratch.discard()
    except WeftError as error:
        if not isinstance(error, OutputError):
            scratch.discard()  # another run on these inputs ends the same way
        raise
    finally:
        scratch.close()
    seconds = time.perf_counter() - begin
    return ExtractReport(output, seconds, resumed, manifest, tuple(manifest["warnings"]))


def _decompose(
    plan: ExtractPlan, scratch: Scratch, threads: int, device: str, on_event: events.OnEvent
) -> dict[str, int]:
    """Read and decompose what is not yet, until all ranks are known.

    Raises:
        WeftError: Nothing changed, or the budget holds nothing.
    """
    from weft.execute.compared import ahead, cost

    read = [change for change in plan.changes if change.is_read]
    done = sum(cost(change) for change in read if change.name in scratch.receipts)
    on_event(events.Started(sum(map(cost, read)), done))
    pending = [change for change in read if change.name not in scratch.receipts]
    with ahead(pending, scratch.finish, on_event):
        load_torch()
    from weft.execute import choose, extraction
    from weft.execute._decomposed import SMALL, spectrum_of

    asked = choose.first_ranks(read, plan.wishes)
    while True:
        pending = [change for change in read if change.name not in scratch.receipts]
        extraction.run(
            pending, scratch, plan.wishes, asked, threads=threads, device=device,
            on_event=on_event,
        )  # fmt: skip
        changed = _changed(plan, scratch.receipts)
        low = [change for change in changed if change.action == "decompose"]
        found = {c.name: spectrum_of(scratch.load(c.name, SMALL)) for c in low}
        # A resumed run may find more than it would have asked for at first.
        asked |= {c.name: max(asked[c.name], found[c.name].rank) for c in low if c.name in asked}
        known = low, found, plan.wishes, partial(_overhead, plan, changed)
        ranks = choose.final_ranks(*known)
        if ranks is None:
            raise _too_few(plan, changed, choose.least_bytes(*known))
        # A budget may want more of a module than was found at first.
        short = [c for c in low if _wants_more(c, ranks[c.name], found[c.name].rank, asked, plan)]
        if not short:
            return _without_large(plan, low, ranks)
        asked |= {c.name: min(4 * asked[c.name], c.form.full_rank) for c in short}
        scratch.forget([change.name for change in short])


def _too_few(plan: ExtractPlan, changed: Sequence[Change], least: int) -> WeftError:
    from weft.execute.choose import saved_bytes

    saved = {c.path: saved_bytes(c) for c in changed if c.action == "save"}
    largest = max(saved, key=lambda path: saved[path], default=None)
    most = f", {saved[largest]:,} of them for {largest} in full" if largest else ""
    return WeftError(
        f"{units.show_size(plan.wishes.rule.value)} are too few: the smallest adapter takes "
        f"{least:,} bytes{most}",
        f"give at least {least:,} bytes, or leave tensors out (--exclude, --embed skip)",
    )


def _wants_more(
    change: Change, rank: int, found: int, asked: Mapping[str, int], plan: ExtractPlan
) -> bool:
    if plan.wishes.rule.kind != "size" or change.rank is not None:
        return False
    return rank >= found == asked[change.name] < change.form.full_rank


def _changed(plan: ExtractPlan, receipts: Mapping[str, Receipt]) -> list[Change]:
    found = [c for c in plan.changes if c.is_read and receipts[c.name].changed]
    if not found:
        raise WeftError(
            "no tensor of TUNED differs from BASE: there is nothing to extract",
            "is TUNED the model that was tuned, and BASE the one before?",
        )
    return found


def _overhead(plan: ExtractPlan, changed: Sequence[Change], ranks: Mapping[str, int]) -> int:
    """Bytes of the file that are no factors: its header, and what is saved in full."""
    from weft.core.specs import job_bytes
    from weft.formats.safetensors import build_header
    from weft.plan._adapter_form import adapter_form

    form = adapter_form(plan, ranks, {change.name for change in changed})
    header, _ = build_header([(e.key, e.dtype, e.shape) for e in form.entries], {"format": "pt"})
    return len(header) + sum(job_bytes(e.change.job) for e in form.entries if e.role == "value")


def _without_large(
    plan: ExtractPlan, low: Sequence[Change], ranks: Mapping[str, int]
) -> dict[str, int]:
    """Without tables that are smaller in full than as factors."""
    from weft.execute.choose import cost, saved_bytes

    return {
        change.name: ranks[change.name]
        for change in low
        if not (
            change.either and ranks[change.name] * cost(change, plan.wishes) >= saved_bytes(change)
        )
    }


def _write(
    plan: ExtractPlan,
    scratch: Scratch,
    ranks: Mapping[str, int],
    output: Path,
    *,
    threads: int,
    command: str,
    warnings: Sequence[str],
    begin: float,
    force: bool,
    tuned: str,
    base: str,
) -> dict[str, Any]:
    """Make the adapter's folder; -> its manifest."""
    from weft.api._extracted import Extracted
    from weft.execute._decomposed import SMALL, spectrum_of
    from weft.execute.assembly import Assembly
    from weft.execute.threads import one_torch_thread
    from weft.plan._adapter_form import adapter_form
    from weft.write.adapter import Made, write_adapter
    from weft.write.adapter_card import extracted_card
    from weft.write.manifest import NAME, to_text

    changed = {change.name for change in _changed(plan, scratch.receipts)}
    form = adapter_form(plan, ranks, changed)
    if not form.entries:
        raise WeftError(
            f"nothing is left to write: {len(changed)} tensors changed, and all are left out",
            "name fewer in --exclude, or more in --target and --save",
        )
    assembly = Assembly(scratch.load, form.scalings, form.entries, threads)
    found = {
        change.name: spectrum_of(scratch.load(change.name, SMALL))
        for change in plan.changes
        if change.name in changed and change.action == "decompose"
    }

    def made(entry: Entry) -> Made:
        return Made(entry.dtype, entry.shape, lambda: assembly.values(entry))

    content: dict[str, Any] = {}

    def texts() -> dict[str, str]:
        result = Extracted(plan, form, ranks, scratch.receipts, assembly.errors, found)
        content.update(
            result.manifest(tuned=tuned, base=base, command=command, warnings=warnings, begin=begin)
        )
        unchanged(plan.reads)
        return {"README.md": extracted_card(plan.config, content), NAME: to_text(content)}

    with one_torch_thread(), closing(assembly):
        write_adapter(
            output,
            {entry.key: made(entry) for entry in form.entries},
            form.config,
            {name: Path(source) for name, source in plan.tokenizer},
            texts=texts,
            force=force,
            within=scratch.folder,
        )
    return content
