"""Tensors that a method goes over more than once, kept as they are stored from the first time on.

To read a file again is to copy it out of the page cache again, which takes longer than most of the
arithmetic. What is kept is bounded: larger tensors are read for every pass.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from weft import methods
from weft.core.dtypes import itemsize
from weft.core.specs import Load, Merge, children
from weft.execute._blocks import Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weft.core.specs import Expression, TensorRef
    from weft.execute._blocks import Files
    from weft.native import Numbers

# Of all tensors of one job together, and of all jobs that are under way: those of more threads.
MOST, MOST_OF_ALL = 128_000_000, 400_000_000  # bytes


class Pool:
    """Memory that jobs leave to those after them: new pages cost as much as they save."""

    def __init__(self) -> None:
        self._free: list[Memory] = []
        self._given = 0
        self._lock = threading.Lock()

    def reserve(self, nbytes: int) -> bool:
        """Whether so many bytes may be taken, which are given back by `release`."""
        with self._lock:
            allowed = self._given + nbytes <= MOST_OF_ALL
            self._given += nbytes if allowed else 0
        return allowed

    def release(self, nbytes: int) -> None:
        with self._lock:
            self._given -= nbytes

    def take(self, nbytes: int) -> Memory:
        with self._lock:
            self._free.sort(key=len)
            for number, memory in enumerate(self._free):
                if len(memory) >= nbytes:
                    return self._free.pop(number)
            del self._free[:1]  # which is too small, and would be so for the next of this size
        return Memory(nbytes)

    def give(self, memory: Memory) -> None:
        with self._lock:
            self._free.append(memory)


class Held:
    """The tensors of one job."""

    def __init__(self, refs: set[TensorRef], pool: Pool) -> None:
        self._pool = pool
        self._memory = {ref: pool.take(ref.nbytes) for ref in refs}
        self._read: dict[TensorRef, bytearray] = {}

    def rows(
        self, files: Files, ref: TensorRef, start: int, stop: int, columns: int
    ) -> Numbers | None:
        """Rows `start` to `stop` as they are stored, flat; None of a tensor that is not kept."""
        if ref not in self._memory:
            return None
        begin = start * columns * itemsize(ref.dtype)
        found = self._memory[ref].numbers(begin, (stop - start) * columns, ref.dtype)
        read = self._read.setdefault(ref, bytearray(ref.numel // max(columns, 1)))
        if read.count(1, start, stop) < stop - start:
            files.read(ref.file, ref.start + begin, found.view)
            read[start:stop] = b"\1" * (stop - start)
        return found

    def close(self) -> None:
        """Leave the memory to others."""
        for memory in self._memory.values():
            self._pool.give(memory)
        self._pool.release(sum(ref.nbytes for ref in self._memory))
        self._memory.clear()


def hold(expression: Expression, numel: int, pool: Pool) -> Held | None:
    """Room for what `expression` reads more than once, if that is not too much."""
    refs = set(_again(expression, again=False))
    refs = {ref for ref in refs if ref.numel == numel}  # and not what has rows in another order
    size = sum(ref.nbytes for ref in refs)
    return Held(refs, pool) if 0 < size <= MOST and pool.reserve(size) else None


def _again(expression: Expression, *, again: bool) -> Iterator[TensorRef]:
    if isinstance(expression, Load) and again:
        yield expression.ref
    if isinstance(expression, Merge):
        again = again or hasattr(methods.method(expression.method), "prepare")
    for each in children(expression):
        yield from _again(each, again=again)
