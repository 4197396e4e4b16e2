"""A plan, carried out: blocks computed and written, the proof taken, the folder put in place."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft import native
from weft.core import events, units
from weft.core.errors import NumericsError, OutputError, PlanError
from weft.core.lazy import load_torch
from weft.core.specs import Load
from weft.formats.identity import identify

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weft.core.specs import Plan, Receipt
    from weft.write.manifest import Totals


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did.

    Attributes:
        output: The folder.
        totals: Tensors changed, survival, bytes.
        seconds: Of work: planning, reading, arithmetic and writing; without the wait for torch,
            where nothing is computed meanwhile.
        resumed: Tensors that an earlier, interrupted run had finished.
        manifest: The content of `weft.json`.
        warnings: What the user should know before using the output.
    """

    output: Path
    totals: Totals
    seconds: float
    resumed: int
    manifest: dict[str, Any] = field(repr=False)
    warnings: tuple[str, ...]


def check_place(device: str, threads: int | None) -> int:
    """How many threads; raises where there cannot be so many, or no such device."""
    from weft.execute.cores import pick_threads

    count = pick_threads(threads)
    if device != "cpu":
        from weft.execute.threads import check_device

        check_device(device)
    return count


def execute(
    plan: Plan,
    output: Path,
    *,
    operation: str,
    command: str,
    card: Callable[[Totals], str],
    examine: Callable[[], Sequence[str]],
    begin: float,
    threads: int,
    device: str,
    force: bool,
    resume: bool,
    on_event: events.OnEvent,
) -> Report:
    """Run `plan` into the folder `output`.

    Args:
        plan: What is to be done.
        output: Folder to create.
        operation: Verb for the manifest.
        command: What the manifest quotes.
        card: Writes README.md, given the totals.
        examine: A look at numbers that takes torch, which is loaded while copies go on: what it
            warns of. It raises what forbids the run.
        begin: When the work began, as `time.perf_counter` tells it.
        threads: That may compute at once.
        device: Where.
        force: Replace an output that is there already.
        resume: Finish an interrupted run.
        on_event: Called with progress, from several threads.

    Raises:
        WeftError: See `weft.core.errors`; the output is not there, and `resume` may finish it.
    """
    from weft.execute import threads as executor
    from weft.execute.copies import Copies
    from weft.write.checkpoint import CheckpointSink
    from weft.write.manifest import NAME, manifest, to_text, totals

    for note in (*plan.notes, *plan.beside):
        on_event(events.Noted(note))
    sink = CheckpointSink(plan, output, force=force, resume=resume, setting=setting(device))
    try:
        pending = sink.pending()
        resumed = len(plan.jobs) - len(pending)
        if resume and not resumed:
            on_event(nothing_to_resume(sink.partial))
        on_event(events.Started(plan.nbytes, plan.nbytes - _size(pending)))
        try:
            with Copies(pending, sink, on_event) as copies:
                run = partial(executor.run, threads=threads, device=device, on_event=on_event)
                plain, others = executor.parted(pending, device)
                with executor.ahead(run, plain if others else (), sink, threads):
                    if others:
                        loading = time.perf_counter()
                        load_torch()  # a second, while copies and plain jobs go on
                        begin += 0 if plain else time.perf_counter() - loading
                    found = examine()
                run(others or plain, sink, copies.futures)
        except (NumericsError, PlanError):
            sink.discard()  # another run on these inputs ends the same way
            raise
        sums = totals(plan, sink.receipts)
        warnings = (*found, *plan.warnings, *_doubtful(sums, plan, sink.receipts, operation))
        content = manifest(
            plan,
            sink.receipts,
            sums,
            operation=operation,
            warnings=warnings,
            version=version("weft"),
            command=command,
            seconds=time.perf_counter() - begin,
        )
        texts = {"README.md": card(sums), NAME: to_text(content)}
        sink.commit(texts, lambda: unchanged(plan))
    finally:
        sink.close()
    for folder in sink.leftovers():
        on_event(events.Noted(f"{folder} is left of a model that was replaced: remove it"))
    return Report(output, sums, time.perf_counter() - begin, resumed, content, tuple(warnings))


def nothing_to_resume(partial: Path) -> events.Noted:
    """Whoever asks for the rest of a run should know that all of it is to be done."""
    return events.Noted(f"nothing to resume in {partial}: this run starts from the beginning")


def setting(device: str) -> str:
    """What the last digits of a result depend on: a run is finished in the setting it began in."""
    place = device.partition(":")[0]
    loops = "compiled" if place == "cpu" and native.library() else "plain"
    return f"weft {version('weft')}, torch {version('torch')}, {place}, {loops} loops"


def _size(jobs: Sequence[Any]) -> int:
    from weft.core.specs import job_bytes

    return sum(job_bytes(job) for job in jobs)


def unchanged(plan: Plan) -> None:
    """Raises OutputError, if a file that was read is another one by now."""
    for entry in plan.inputs:
        path = Path(entry.path)
        if not path.exists() or identify(path) != entry.identity:
            raise OutputError(
                f"{entry.path} changed while it was being read", "run again with --force"
            )


def _doubtful(
    sums: Totals, plan: Plan, receipts: Mapping[str, Receipt], operation: str
) -> list[str]:
    """Warnings that only the result can give cause for."""
    warnings = []
    models = {e.role.partition(" adapter")[0] for e in plan.inputs if e.role[:7] != "adapter"}
    moved = any(
        isinstance(j.expression, Load) and j.expression.ref.name != j.name for j in plan.jobs
    )
    equal = len(models) == 1 and not moved and not sums.changed and not sums.merged
    if equal and not any(job.operation == "cast" for job in plan.jobs):
        warnings.append("the output equals the base: no element of any tensor changed")
    elif _updates_nothing(receipts):
        warnings.append("ΔW is zero in every tensor: the output is the base, in another dtype")
    warnings += _too_large(plan, receipts)
    if unsound := [receipt.name for receipt in receipts.values() if not receipt.sound]:
        more = f" and {len(unsound) - 1} more" if len(unsound) > 1 else ""
        warnings.append(f"NaN or infinity in {min(unsound)}{more}, taken over as they were")
    narrow = ", ".join(sorted({job.dtype for job in plan.jobs if not job.is_copy}))
    wide = "`out_dtype: float32` in the recipe" if operation == "run" else "--dtype float32"
    if sums.survival is not None and sums.survival < 0:
        warnings.append(
            f"the update is smaller than the rounding of the weights themselves: writing them as "
            f"{narrow} moves them {1 - sums.survival:.3g} times as far; {wide} keeps all of it"
        )
    elif sums.survival is not None and sums.survival < 0.5:
        warnings.append(
            f"only {units.show_survival(sums.survival)} of the update is left after rounding to "
            f"{narrow}: {wide} keeps all of it"
        )
    return warnings


def _updates_nothing(receipts: Mapping[str, Receipt]) -> bool:
    found = [receipt.delta for receipt in receipts.values() if receipt.delta is not None]
    return bool(found) and not any(found)


# A new head, a trained bias or token may well outweigh what was there.
_MAY_OUTWEIGH = {"replace", "trainable_tokens", "lora_bias"}


def _too_large(plan: Plan, receipts: Mapping[str, Receipt]) -> list[str]:
    """Updates that outweigh what they update, as no training makes them."""
    found = [
        (receipts[job.name].relative or 0.0, job.name)
        for job in plan.jobs
        if _MAY_OUTWEIGH.isdisjoint(job.operation.split(" + "))
    ]
    adapted = any("adapter" in entry.role for entry in plan.inputs)
    check = (
        "check lora_alpha and r, the weight given to the adapter, and that this is its base"
        if adapted
        else "check the weights, and that the models were tuned from this base"
    )
    return outweighing(found, check)


def outweighing(found: Sequence[tuple[float, str]], check: str) -> list[str]:
    """A line on those of (‖ΔW‖/‖W‖, name) that are over 1, if any are, and what to check."""
    large = [each for each in found if each[0] > 1]
    if not large:
        return []
    share, name = max(large)
    others = f" and over 100 % in {len(large) - 1} more" if len(large) > 1 else ""
    what = f"‖ΔW‖ is {units.show_share(share)} of ‖W‖ in {name}{others}: more than training does"
    return [f"{what}; {check}"]
