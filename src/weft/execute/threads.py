"""The executor on one machine: threads that share a queue of pieces.

Torch and the kernel's I/O release the interpreter's lock, so reading, arithmetic and writing
overlap: while `threads` workers compute, the others write. A piece is a strip of rows of one
tensor. Strips do not depend on the number of threads, and their sums are added in their order:
output and receipts are the same for any number. What is only copied has threads of its own.
"""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from weft import methods, native
from weft.core.blocks import STRIP, WORKERS, cut
from weft.core.dtypes import itemsize
from weft.core.errors import WeftError
from weft.core.events import Moved, OnEvent
from weft.core.lazy import torch, torch_is_loaded
from weft.core.specs import Receipt, TensorJob
from weft.execute._blocks import Files, Workspace
from weft.execute._crew import Crew
from weft.execute._expressions import Shared, task_of
from weft.execute._held import Pool
from weft.execute._kernel import Kernel, Sums
from weft.execute._loops import compiled, reads
from weft.plan.layout import layout, shared_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future


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


def check_device(name: str) -> None:
    """`cpu`, `cuda` or `cuda:n`.

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


def parted(jobs: Sequence[TensorJob], device: str) -> tuple[list[TensorJob], list[TensorJob]]:
    """Those that need compiled loops alone, as long as all numbers are finite, and those for torch.

    Jobs that are copies are neither.
    """
    loops = compiled(device)
    jobs = [job for job in jobs if not job.is_copy]
    plain = [job for job in jobs if loops and _is_plain(job)]
    names = {job.name for job in plain}
    return plain, [job for job in jobs if job.name not in names]


def _is_plain(job: TensorJob) -> bool:
    """A method of which loops are all that there is, on tensors that they read."""
    merge = job.expression
    if not reads(merge) or not native.reads(job.dtype):
        return False
    return methods.without_torch(methods.method(merge.method), task_of(merge, layout(job).columns))


@dataclass(slots=True)
class _Group:
    """A job in its pieces."""

    job: TensorJob
    pieces: list[tuple[int, int]]
    kernel: Kernel | None = None
    sums: dict[int, Sums] = field(default_factory=dict)
    closed_form: Sums = field(default_factory=Sums)
    left: int = 0
    begun: bool = False
    following: _Group | None = field(default=None, repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class _Around:
    """What all pieces share."""

    sink: Sink
    files: Files
    workspace: Workspace
    shared: Shared
    crew: Crew
    pool: Pool
    on_event: OnEvent


def run(
    jobs: Sequence[TensorJob],
    sink: Sink,
    beside: Sequence[Future[None]] = (),
    *,
    threads: int,
    device: str,
    on_event: OnEvent,
    crew: Crew | None = None,
    has_torch: bool | None = None,
) -> None:
    """Evaluate every job, write its blocks to `sink`, and leave a receipt for each.

    Args:
        jobs: None of them is a copy.
        sink: Takes the blocks.
        beside: Is under way, such as copies, and has come to its end too when this returns.
        threads: That may compute at once.
        device: Where.
        on_event: Called with progress, from several threads.
        crew: Of so many threads, for a caller who may want to stop it.
        has_torch: Torch is loaded; None looks. One that is loading now would be waited for.

    Raises:
        WeftError: What went wrong first; the threads have stopped.
    """
    files, workspace = Files(), Workspace(device)
    groups = [_group(job, STRIP[workspace.kind]) for job in jobs]
    for one, other in pairwise(groups):
        one.following = other
    crew = crew or Crew(iter(()), threading.Semaphore(threads))
    shared = Shared(shared_at_once(jobs))
    around = _Around(sink, files, workspace, shared, crew, Pool(), on_event)
    crew.queue = iter(
        [
            partial(_run_piece, group, n, around)
            for group in groups
            for n in range(len(group.pieces))
        ]
    )

    def work() -> None:
        with alone(), stream(workspace):
            crew.work()

    # Torch may come late, for a closer look at NaN: that may use as many threads as it likes.
    loaded = torch_is_loaded() if has_torch is None else has_torch
    alone = one_torch_thread if loaded else nullcontext
    workers = WORKERS * threads
    pool = ThreadPoolExecutor(workers, thread_name_prefix="weft")
    with alone():  # until all threads, which set it too, have ended
        try:
            futures = [pool.submit(work) for _ in range(workers)]
            done, _ = wait([*futures, *beside], return_when=FIRST_EXCEPTION)
            crew.stop()
            for future in done:
                future.result()
        finally:
            crew.stop()
            pool.shutdown(wait=True)
            files.close()


@contextmanager
def ahead(
    run: Callable[..., None], jobs: Sequence[TensorJob], sink: Sink, threads: int
) -> Iterator[None]:
    """`run` jobs that need no torch while it loads; they have come to their end when this does."""
    if not jobs:
        yield
        return
    threads = max(1, threads - 1)  # the other is busy loading
    crew = Crew(iter(()), threading.Semaphore(threads))
    with ThreadPoolExecutor(1, thread_name_prefix="weft ahead") as pool:
        try:
            done = pool.submit(
                run, jobs, sink, threads=threads, crew=crew, has_torch=torch_is_loaded()
            )
            yield
            done.result()
        finally:
            crew.stop()


@contextmanager
def one_torch_thread() -> Iterator[None]:
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


def stream(workspace: Workspace) -> torch.cuda.StreamContext | nullcontext[None]:
    return nullcontext() if workspace.stream is None else torch.cuda.stream(workspace.stream)


def _group(job: TensorJob, strip: int) -> _Group:
    form = layout(job)
    pieces = cut(0, form.rows, form.columns, strip, form.together)
    return _Group(job, pieces, left=len(pieces))


def _run_piece(group: _Group, number: int, around: _Around) -> None:
    (start, stop), job = group.pieces[number], group.job
    kernel = _ready(group, around)
    if kernel is None:
        return
    row = kernel.layout.columns * itemsize(job.dtype)
    offset = around.sink.offset(job.name) + start * row
    with around.crew.cores:
        data, sums = kernel.run(start, stop, offset)
    around.sink.write(job, offset, data)
    around.on_event(Moved(kernel.bytes_read(stop - start), len(data)))
    group.sums[number] = sums
    group.closed_form = kernel.closed_form
    with group.lock:
        group.left -= 1
        if group.left:
            return
    kernel.close()
    group.kernel = None  # the factors go as soon as nobody needs them
    around.sink.finish([_receipt(group)])


def _ready(group: _Group, around: _Around) -> Kernel | None:
    """The group's kernel: one thread makes it ready, and the others help; None when stopped.

    Where there is nothing to help with, the next group is made ready meanwhile.
    """
    if not _prepare(group, around) and group.kernel is None:
        if group.following is not None:
            _prepare(group.following, around)
        around.crew.wait_for(lambda: group.kernel is not None)
    return group.kernel


def _prepare(group: _Group, around: _Around) -> bool:
    """Make the group ready, unless another thread has begun to."""
    with group.lock:
        if group.begun:
            return False
        group.begun = True
    with around.crew.cores:
        group.kernel = Kernel(
            group.job, around.files, around.workspace, around.shared, around.crew, around.pool
        )
    around.crew.announce()
    return True


def _receipt(group: _Group) -> Receipt:
    total = sum((group.sums[n] for n in sorted(group.sums)), group.closed_form)
    if not total.compared:
        return Receipt(group.job.name, sound=total.sound)
    return Receipt(group.job.name, total.base, total.delta, total.error, total.changed)
