"""The executor on one machine: threads that share a queue of pieces.

Torch and the kernel's I/O release the interpreter's lock, so reading, arithmetic and writing
overlap: while `threads` workers compute, the others write. A piece is a strip of rows of one
tensor, or a range of bytes that is only copied. Strips do not depend on the number of threads, and
their sums are added in their order: output and receipts are the same for any number.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from weft.core.blocks import COPY, STRIP, WORKERS, cut
from weft.core.errors import WeftError
from weft.core.events import Moved, OnEvent
from weft.core.specs import Load, Receipt, TensorJob
from weft.execute._blocks import Files, Workspace
from weft.execute._crew import Crew
from weft.execute._expressions import Shared
from weft.execute._kernel import Kernel, Sums
from weft.plan.layout import layout, shared_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Sink(Protocol):
    """Where blocks go; it knows every tensor's final place before anything is computed."""

    def offset(self, name: str) -> int:
        """Where the bytes of the tensor begin in its shard."""

    def write(self, job: TensorJob, offset: int, data: memoryview) -> None:
        """Put bytes at `offset` of the job's shard."""

    def copy(self, job: TensorJob, offset: int, file: str, start: int, count: int) -> None:
        """Put `count` bytes of `file`, from `start` on, at `offset` of the job's shard."""

    def finish(self, receipts: Sequence[Receipt]) -> None:
        """These tensors are complete."""


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


def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:n` -> the device.

    Raises:
        WeftError: There is no such device here.
    """
    kind, _, number = name.partition(":")
    sound = kind == "cuda" and (number.isdigit() or name == "cuda")
    if name != "cpu" and not sound:
        raise WeftError(f"unknown device {name!r}", "one of cpu, cuda, cuda:0, cuda:1 …")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            raise WeftError(
                f"no device {name!r}: torch {torch.__version__} sees {count} CUDA devices",
                "write --device cpu",
            )
    return torch.device(name)


@dataclass(slots=True)
class _Group:
    """Jobs that become complete together: one that is computed, or a run of adjacent copies."""

    jobs: list[TensorJob]
    pieces: list[tuple[int, int]]
    kernel: Kernel | None = None
    sums: dict[int, Sums] = field(default_factory=dict)
    closed_form: Sums = field(default_factory=Sums)
    left: int = 0
    begun: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


def run(
    jobs: Sequence[TensorJob],
    sink: Sink,
    *,
    threads: int,
    device: torch.device,
    on_event: OnEvent,
) -> None:
    """Evaluate every job, write its blocks to `sink`, and leave a receipt for each.

    Raises:
        WeftError: What went wrong first; the threads have stopped.
    """
    groups = list(_group(jobs, sink, STRIP[device.type]))
    files = Files()
    workspace = Workspace(device)
    shared = Shared(shared_at_once(jobs))
    pieces = iter([(group, number) for group in groups for number in range(len(group.pieces))])

    def tasks() -> Iterator[Callable[[], None]]:
        for group, number in pieces:
            yield partial(_run_piece, group, number, sink, files, workspace, shared, crew, on_event)

    crew = Crew(tasks(), threading.Semaphore(threads))

    def work() -> None:
        with _one_torch_thread(), _stream(workspace):
            crew.work()

    workers = WORKERS * threads
    pool = ThreadPoolExecutor(workers, thread_name_prefix="weft")
    try:
        with _one_torch_thread():
            futures = [pool.submit(work) for _ in range(workers)]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            crew.stop()
            for future in done:
                future.result()
    finally:
        crew.stop()
        pool.shutdown(wait=True)
        files.close()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The threads are ours: torch starting its own in each would make them fight for the cores.

    And float32 is float32: a program that allowed TF32 for its training did not mean the merge.
    """
    before = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)


def _stream(workspace: Workspace) -> torch.cuda.StreamContext | nullcontext[None]:
    return nullcontext() if workspace.stream is None else torch.cuda.stream(workspace.stream)


def _group(jobs: Sequence[TensorJob], sink: Sink, strip: int) -> Iterator[_Group]:
    run_of_copies: list[TensorJob] = []
    for job in jobs:
        if job.is_copy and run_of_copies and _adjacent(run_of_copies[-1], job, sink):
            run_of_copies.append(job)
            continue
        if run_of_copies:
            yield _copies(run_of_copies)
        run_of_copies = [job] if job.is_copy else []
        if not job.is_copy:
            form = layout(job)
            pieces = cut(0, form.rows, form.columns, strip, form.together)
            yield _Group([job], pieces, left=len(pieces))
    if run_of_copies:
        yield _copies(run_of_copies)


def _adjacent(one: TensorJob, other: TensorJob, sink: Sink) -> bool:
    """Whether `other` follows `one` without a gap, both where it is read and where it goes."""
    assert isinstance(one.expression, Load)
    assert isinstance(other.expression, Load)
    here, there = one.expression.ref, other.expression.ref
    return (
        one.shard == other.shard
        and here.file == there.file
        and here.stop == there.start
        and sink.offset(one.name) + here.nbytes == sink.offset(other.name)
    )


def _copies(jobs: list[TensorJob]) -> _Group:
    first, last = jobs[0].expression, jobs[-1].expression
    assert isinstance(first, Load)
    assert isinstance(last, Load)
    edges = [*range(first.ref.start, last.ref.stop, COPY), last.ref.stop]
    pieces = list(pairwise(edges)) or [(last.ref.stop, last.ref.stop)]
    return _Group(jobs, pieces, left=len(pieces))


def _run_piece(
    group: _Group,
    number: int,
    sink: Sink,
    files: Files,
    workspace: Workspace,
    shared: Shared,
    crew: Crew,
    on_event: OnEvent,
) -> None:
    start, stop = group.pieces[number]
    job = group.jobs[0]
    if job.is_copy:
        assert isinstance(job.expression, Load)
        ref = job.expression.ref
        sink.copy(job, sink.offset(job.name) + start - ref.start, ref.file, start, stop - start)
        on_event(Moved(stop - start, stop - start))
    else:
        kernel = _ready(group, files, workspace, shared, crew)
        if kernel is None:
            return
        row = kernel.layout.columns * getattr(torch, job.dtype).itemsize
        offset = sink.offset(job.name) + start * row
        with crew.cores:
            data, sums = kernel.run(start, stop, offset)
        sink.write(job, offset, data)
        on_event(Moved(kernel.bytes_read(stop - start), len(data)))
        if sums:
            group.sums[number] = sums
            group.closed_form = kernel.closed_form
    with group.lock:
        group.left -= 1
        if group.left:
            return
    group.kernel = None  # the factors go as soon as nobody needs them
    sink.finish(_receipts(group))


def _ready(
    group: _Group, files: Files, workspace: Workspace, shared: Shared, crew: Crew
) -> Kernel | None:
    """The group's kernel: one thread makes it ready, and the others help; None when stopped."""
    with group.lock:
        mine, group.begun = not group.begun, True
    if mine:
        with crew.cores:
            group.kernel = Kernel(group.jobs[0], files, workspace, shared, crew)
        crew.announce()
    else:
        crew.wait_for(lambda: group.kernel is not None)
    return group.kernel


def _receipts(group: _Group) -> list[Receipt]:
    if not group.sums:
        return [Receipt(job.name) for job in group.jobs]
    total = sum((group.sums[n] for n in sorted(group.sums)), group.closed_form)
    return [Receipt(group.jobs[0].name, total.base, total.delta, total.error, total.changed)]
