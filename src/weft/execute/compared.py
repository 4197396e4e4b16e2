"""Tensors that an extraction only compares: those that did not change, or are saved in full.

Compiled loops do it without torch: so it is done while torch loads for the others.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weft.core.events import Moved, OnEvent
from weft.core.specs import Merge, Receipt, leaves
from weft.execute._blocks import Files, Workspace
from weft.execute._differences import Difference
from weft.execute._expressions import Shared
from weft.execute._loops import compiled, reads
from weft.plan.layout import shared_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weft.plan.extract import Change


def cost(change: Change) -> int:
    """Bytes that are read of it."""
    return sum(ref.nbytes for job in change.jobs for ref in leaves(job.expression))


def compared(change: Change, files: Files, workspace: Workspace, shared: Shared) -> Receipt:
    """‖ΔW‖² and ‖W + ΔW‖² of a tensor that is not decomposed.

    Raises:
        NumericsError: NaN or infinity.
    """
    energy, tuned = Difference(change, files, workspace, shared).squares()
    return receipt(change, energy, tuned)


def receipt(change: Change, energy: float, tuned: float) -> Receipt:
    """By ‖ΔW‖² and ‖W + ΔW‖²."""
    new = change.fresh and not isinstance(change.job.expression, Merge)
    return Receipt(change.name, tuned, energy, None, new or energy > 0)


@contextmanager
def ahead(
    changes: Sequence[Change], finish: Callable[[Receipt, None], None], on_event: OnEvent
) -> Iterator[None]:
    """Compare, in the order of their size, those that need no torch; until this is left.

    Args:
        changes: Some are, and the others are left alone.
        finish: Takes each receipt.
        on_event: Called with progress, from another thread.
    """
    plain = sorted(filter(_is_plain, changes), key=lambda change: -cost(change))
    left, files = threading.Event(), Files()
    shared = Shared(shared_at_once([job for change in plain for job in change.jobs]))

    def work() -> None:
        workspace = Workspace("cpu")
        for change in plain:
            if left.is_set():
                return
            finish(compared(change, files, workspace, shared), None)
            on_event(Moved(cost(change), 0))

    with ThreadPoolExecutor(1, thread_name_prefix="weft ahead") as pool:
        try:
            done = pool.submit(work)
            yield
            left.set()
            done.result()
        finally:
            left.set()
            pool.shutdown(wait=True)
            files.close()


def _is_plain(change: Change) -> bool:
    """Not decomposed, and of tensors that compiled loops read, in each of its parts."""
    parts = [job.expression for job in change.jobs]
    return change.action != "decompose" and compiled("cpu") and all(map(reads, parts))
