"""What does not change, moved by threads of its own: they need no torch, and begin before it loads.

Reading and writing release the interpreter's lock, and the copies take no core from the arithmetic
that they later run beside. A piece is a range of bytes; tensors that follow each other both where
they are read and where they go are moved as one range.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Self

from weft.core.blocks import COPIERS, COPY
from weft.core.events import Moved, OnEvent
from weft.core.specs import Load, Receipt, TensorJob, TensorRef

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weft.execute.threads import Sink


class Copies:
    """The copies among `jobs`, under way as soon as this is entered; left, they have stopped.

    Attributes:
        futures: Done when every tensor has its receipt; they raise what went wrong.
    """

    def __init__(self, jobs: Sequence[TensorJob], sink: Sink, on_event: OnEvent) -> None:
        self._sink = sink
        self._on_event = on_event
        groups = _group([job for job in jobs if job.is_copy], sink)
        self._queue = iter([(group, piece) for group in groups for piece in group.pieces])
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(COPIERS, thread_name_prefix="weft-copy")

    def __enter__(self) -> Self:
        self.futures = [self._pool.submit(self._work) for _ in range(COPIERS)]
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True)

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                item = next(self._queue, None)
            if item is None:
                return
            self._move(*item)

    def _move(self, group: _Group, piece: tuple[int, int]) -> None:
        (start, stop), first = piece, group.jobs[0]
        ref = _source(first)
        offset = self._sink.offset(first.name) + start - ref.start
        self._sink.copy(first, offset, ref.file, start, stop - start)
        self._on_event(Moved(stop - start, stop - start))
        with group.lock:
            group.left -= 1
            if group.left:
                return
        self._sink.finish([Receipt(job.name) for job in group.jobs])


@dataclass(slots=True)
class _Group:
    """Adjacent tensors, which become complete together."""

    jobs: list[TensorJob]
    pieces: list[tuple[int, int]]
    left: int
    lock: threading.Lock = field(default_factory=threading.Lock)


def _group(jobs: Sequence[TensorJob], sink: Sink) -> Iterator[_Group]:
    adjacent: list[TensorJob] = []
    for job in jobs:
        if adjacent and not _follows(adjacent[-1], job, sink):
            yield _cut(adjacent)
            adjacent = []
        adjacent.append(job)
    if adjacent:
        yield _cut(adjacent)


def _follows(one: TensorJob, other: TensorJob, sink: Sink) -> bool:
    """Whether `other` follows `one` without a gap, both where it is read and where it goes."""
    here, there = _source(one), _source(other)
    return (
        one.shard == other.shard
        and here.file == there.file
        and here.stop == there.start
        and sink.offset(one.name) + here.nbytes == sink.offset(other.name)
    )


def _cut(jobs: list[TensorJob]) -> _Group:
    start, stop = _source(jobs[0]).start, _source(jobs[-1]).stop
    pieces = list(pairwise([*range(start, stop, COPY), stop])) or [(stop, stop)]
    return _Group(jobs, pieces, left=len(pieces))


def _source(job: TensorJob) -> TensorRef:
    assert isinstance(job.expression, Load)
    return job.expression.ref
