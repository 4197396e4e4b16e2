"""How a tensor is cut into pieces that are read, computed and written one at a time."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.core.specs import Shape

# A block is what one thread works on at a time; its float32 buffers stay near the core.
BLOCK = {"cpu": 2**19, "cuda": 2**24}  # elements
# Compiled loops of merge methods have theirs nearer: with blocks so many times as large the
# interpreter has less to do.
COMPILED = 2
# The same where they only compare: with each call a thread asks for the interpreter, which another
# may keep for longer than the call takes.
COMPARED = 16
# A strip is what one thread takes from the queue and writes at once, large enough for any disk;
# sums are added per strip, in order.
STRIP = {"cpu": 2**22, "cuda": 2**24}  # elements
COPY_BUFFER = 2**23  # bytes read at a time where the kernel does not copy by itself
WORKERS = 2  # for each thread that may compute: the other writes, or waits for the disk
PAGE = 4096  # bytes; files are written past the page cache in whole ones
COPY = 2**25  # bytes of unchanged tensors, moved at a time
COPIERS = 4  # threads that move them, however many may compute
# From 16 rows on, a matrix product's bits do not depend on how many rows are taken at once.
MIN_ROWS = 16


def rows_and_columns(shape: Shape) -> tuple[int, int]:
    """A tensor as a matrix: dimension 0, and all others flattened."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def cut(
    start: int, stop: int, columns: int, elements: int, together: int = 1
) -> list[tuple[int, int]]:
    """Rows `start` to `stop` in even pieces of about `elements`, never a thin last one.

    Pieces begin at multiples of `together` from `start` on.
    """
    units = -(-(stop - start) // together)
    size = max(elements // max(columns * together, 1), -(-2 * MIN_ROWS // together))
    pieces = max(1, -(-units // size))
    edges = [min(start + units * n // pieces * together, stop) for n in range(pieces + 1)]
    return list(itertools.pairwise(edges))
