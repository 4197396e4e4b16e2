"""Two models, tensor by tensor: what differs and by how much, in one pass over both.

Blocks do not depend on the number of threads, and their sums are added in their order: the result
is the same for any number. There is no torch here, unless a side has to be computed: importing it
takes longer than reading two models of a billion weights.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.core.blocks import BLOCK, STRIP, WORKERS, cut
from weft.core.dtypes import itemsize
from weft.core.errors import Unsupported
from weft.core.events import Moved, OnEvent, Started
from weft.execute._difference import NEAR, Sums, base, same_bytes, sums
from weft.execute._files import Files
from weft.execute._sides import Buffers, Model, Side, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from weft.core.specs import TensorJob

    Two = tuple[TensorJob, TensorJob]


@dataclass
class Work:
    """A pair in its pieces.

    Attributes:
        a, b: The sides.
        count: Elements.
        pieces: Ranges of them; of what has to be computed, as large as it is computed at once.
        found: Number of the piece -> its sums.
    """

    a: Side
    b: Side
    count: int
    pieces: list[tuple[int, int]]
    found: dict[int, Sums] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def dtypes(self) -> tuple[str, str]:
        return self.a.dtype, self.b.dtype

    @property
    def stored(self) -> bool:
        """Nothing has to be computed, and any range may be read."""
        return isinstance(self.a, Stored) and isinstance(self.b, Stored)

    @property
    def nbytes(self) -> int:
        return self.count * sum(map(itemsize, self.dtypes))

    @property
    def total(self) -> Sums:
        return sum((self.found[n] for n in sorted(self.found)), Sums())


def compare(
    pairs: Sequence[Two], *, threads: int, ranks: bool, on_event: OnEvent
) -> list[tuple[Sums, float | None]]:
    """The sums of every pair, and with `ranks` the stable rank of what differs.

    Raises:
        WeftError: What went wrong first; the threads have stopped.
    """
    files, buffers = Files(), Buffers()
    try:
        one, other = (
            Model(slot, [pair[n] for pair in pairs], files) for n, slot in enumerate(("a", "b"))
        )
        works = [_work(pair, one.side(pair[0]), other.side(pair[1])) for pair in pairs]
        torch = one.computes or other.computes
        on_event(Started(sum(work.nbytes for work in works), 0))
        tasks = (
            partial(_piece, work, number, buffers, on_event)
            for work in works
            for number in range(len(work.pieces))
        )
        each(tasks, threads, torch=torch)
        again = (
            partial(_rest, work, number, buffers)
            for work in works
            if any(found.changed for found in work.found.values())
            for number, found in list(work.found.items())
            if found.left
        )
        each(again, threads, torch=torch)
        totals = [work.total for work in works]
        found: list[float | None] = [None] * len(works)
        if ranks:
            from weft.execute.stable_rank import stable_ranks

            found = stable_ranks(pairs, works, totals, threads)
    finally:
        files.close()
    return list(zip(totals, found, strict=True))


def each(tasks: Iterable[Callable[[], Any]], threads: int, *, torch: bool) -> None:
    """Do all of `tasks`: while some wait for the disk, others compute.

    Raises:
        BaseException: What a task raised first; the others are stopped.
    """
    queue, lock, stopped = iter(tasks), threading.Lock(), threading.Event()

    def work() -> None:
        with _one_torch_thread() if torch else nullcontext(), np.errstate(all="ignore"):
            while not stopped.is_set():
                with lock:
                    task = next(queue, None)
                if task is None:
                    return
                task()

    with ThreadPoolExecutor(WORKERS * threads, thread_name_prefix="weft") as pool:
        try:
            futures = [pool.submit(work) for _ in range(WORKERS * threads)]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
        for future in done:
            future.result()


def _one_torch_thread() -> Any:
    from weft.execute.threads import one_torch_thread

    return one_torch_thread()


def _work(pair: Two, a: Side, b: Side) -> Work:
    if a.dtype != b.dtype and "complex64" in (a.dtype, b.dtype):
        raise Unsupported(
            f"{pair[0].name} is {a.dtype} in A and {b.dtype} in B: weft takes no difference of the "
            "two",
            "leave it out with --filter",
        )
    count = math.prod(pair[0].shape)
    if isinstance(a, Stored) and isinstance(b, Stored):
        same = a.ref == b.ref
        return Work(a, b, count, [] if same or not count else cut(0, count, 1, STRIP["cpu"]))
    return Work(a, b, count, pieces(a, b, count))


def pieces(a: Side, b: Side, count: int, unit: int = 1) -> list[tuple[int, int]]:
    """All elements in ranges that both sides can be read in, and that `unit` divides."""
    unit = math.lcm(max(a.unit, 1), max(b.unit, 1), unit)
    return cut(0, count, 1, BLOCK["cpu"], unit) if count else []


def _piece(work: Work, number: int, buffers: Buffers, on_event: OnEvent) -> None:
    start, stop = work.pieces[number]
    total = Sums()
    step = NEAR if work.stored else stop - start
    for first in range(start, stop, step):
        last = min(first + step, stop)
        total += _block(work, first, last, buffers, keep=bool(total.changed))
    work.found[number] = total
    read = (stop - start) * sum(map(itemsize, work.dtypes))
    on_event(Moved(read, read))
    if not work.stored and len(work.found) == len(work.pieces):
        work.a.rest()
        work.b.rest()


def _block(work: Work, start: int, stop: int, buffers: Buffers, *, keep: bool) -> Sums:
    """Elements `start` to `stop`; `keep` says that ‖B‖² will be asked for."""
    a, b = work.a.read(start, stop), work.b.read(start, stop)
    total = Sums()
    for first in range(0, stop - start, NEAR):
        mine, yours = (
            raw[first * size : (first + NEAR) * size]
            for raw, size in zip((a, b), map(itemsize, work.dtypes), strict=True)
        )
        if work.a.dtype != work.b.dtype or not same_bytes(mine, yours):
            total += sums(mine, yours, work.dtypes, buffers)
        elif keep or not work.stored:
            total += Sums(base=base(yours, work.b.dtype, buffers))
        else:
            total += Sums(left=((start + first, min(start + first + NEAR, stop)),))
    return total


def _rest(work: Work, number: int, buffers: Buffers) -> None:
    """‖B‖² of what was equal, in a tensor that differs elsewhere."""
    found = work.found[number]
    for start, stop in found.left:
        found += Sums(base=base(work.b.read(start, stop), work.b.dtype, buffers))
    work.found[number] = found
