"""The executor of an extraction: tensors are read, and those that changed decomposed.

Each is one thread's from its first byte to its factors, with one of torch's own threads: so the
bits depend neither on how many threads there are nor on what the others do. The system reads the
next tensors meanwhile.
"""

from __future__ import annotations

import itertools
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from weft.core.events import Moved, OnEvent
from weft.core.specs import leaves
from weft.decompose._rough import multiplies_bfloat16
from weft.decompose.even import Evening
from weft.decompose.krylov import Svd, key_of, svd_until, truncated_svd
from weft.decompose.matrices import Dense
from weft.decompose.noise import signal
from weft.decompose.ranks import rank_for_energy
from weft.execute._auto import START, update_of
from weft.execute._blocks import Files, Workspace
from weft.execute._decomposed import clear, stacked
from weft.execute._differences import Difference, Sums
from weft.execute._expressions import Shared
from weft.execute._streamed import Streamed
from weft.execute.compared import compared, cost, receipt
from weft.execute.threads import one_torch_thread, stream
from weft.plan.layout import shared_at_once

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from weft.core.specs import Receipt
    from weft.core.wishes import Wishes
    from weft.decompose.noise import Signal
    from weft.plan.extract import Change

# A difference of more bytes is not held in memory, but read again for every product.
HELD = 200_000_000
# Of the mean: what noise the row of a matrix has at least, where its weights are zeros.
_LEAST_NOISE = 1e-8


class Store(Protocol):
    """Where the factors go until all are known."""

    def finish(self, receipt: Receipt, tensors: Mapping[str, Tensor] | None) -> None:
        """A tensor is read, and decomposed where `tensors` say how."""


@dataclass(slots=True)
class _Run:
    """What the threads share."""

    store: Store
    wishes: Wishes
    asked: Mapping[str, int]
    files: Files
    workspace: Workspace
    shared: Shared
    on_event: OnEvent
    stopped: bool = False


def run(
    changes: Sequence[Change],
    store: Store,
    wishes: Wishes,
    asked: Mapping[str, int],
    *,
    threads: int,
    device: str,
    on_event: OnEvent,
) -> None:
    """Read every change, decompose what is to be, and leave a receipt for each.

    Args:
        changes: Those without a receipt.
        store: Takes the results.
        wishes: Say which rank is enough.
        asked: Name -> the rank to which it is decomposed, where that is known before.
        threads: That may compute at once.
        device: Where matrices are multiplied.
        on_event: Called with progress, from several threads.

    Raises:
        WeftError: What went wrong first; the threads have stopped.
    """
    jobs = [job for change in changes for job in change.jobs]
    state = _Run(
        store,
        wishes,
        asked,
        Files(),
        Workspace(device),
        Shared(shared_at_once(jobs)),
        on_event,
    )
    # The largest first: none of them is left for one thread at the end.
    queue = sorted(changes, key=lambda change: -cost(change))
    numbers = itertools.count()  # of which each is given to one thread alone

    def work() -> None:
        with one_torch_thread(), stream(state.workspace):
            while not state.stopped:
                number = next(numbers)
                if number >= len(queue):
                    return
                for later in queue[number + threads : number + threads + 1]:
                    _read_ahead(state.files, later)
                _one(state, queue[number])

    pool = ThreadPoolExecutor(threads, thread_name_prefix="weft")
    with one_torch_thread():  # until all threads, which set it too, have ended
        try:
            done, _ = wait([pool.submit(work) for _ in range(threads)], return_when=FIRST_EXCEPTION)
            state.stopped = True
            for future in done:
                future.result()
        finally:
            state.stopped = True
            pool.shutdown(wait=True)
            state.files.close()


def _read_ahead(files: Files, change: Change) -> None:
    for job in change.jobs:
        for ref in leaves(job.expression):
            files.soon(ref.file, ref.start, ref.nbytes)


def _one(state: _Run, change: Change) -> None:
    """Read a tensor, decompose it if it is to be, and tell the store."""
    if change.action != "decompose":
        found = compared(change, state.files, state.workspace, state.shared)
        tensors = None
    else:
        found, tensors = _decomposed(state, change)
    state.store.finish(found, tensors)
    state.on_event(Moved(cost(change), 0))


def _decomposed(state: _Run, change: Change) -> tuple[Receipt, dict[str, Tensor] | None]:
    """The sums of a tensor, and the factors of its matrices if it changed."""
    source = Difference(change, state.files, state.workspace, state.shared)
    svds, signals, parts = [], [], []
    # As many rows of the difference as one matrix has; a kernel's are cut otherwise.
    rows = source.rows // change.form.count
    for number in range(change.form.count):
        svd, above, sums = _decompose(state, source, number * rows, (number + 1) * rows, number)
        svds.append(svd)
        signals.append(above)
        parts.append(sums)
    energy = sum(part.energy for part in parts)
    shape = change.form.rows, change.form.columns
    edges = [part.noise.edge(shape) for part in parts]
    tensors = stacked(svds, signals, edges).tensors() if energy > 0 else None
    return receipt(change, energy, sum(part.tuned for part in parts)), tensors


def _decompose(
    state: _Run, source: Difference, start: int, stop: int, number: int
) -> tuple[Svd, Signal, Sums]:
    """One matrix: rows `start` to `stop` of the difference."""
    form, columns = source.change.form, source.columns
    auto = state.wishes.rule.kind == "auto" and source.change.name not in state.asked
    # A kernel is read by other rows than it has.
    even = Evening(columns, _LEAST_NOISE) if auto and columns == form.columns else None
    matrix: Dense | Streamed
    values: Tensor | None = None
    if 4 * (stop - start) * columns <= HELD:
        size = (stop - start, columns)
        values = state.workspace.compute("difference", *size, source.dtype)
        rough = None
        if multiplies_bfloat16(values.device):
            rough = state.workspace.compute("rough", *size, torch.bfloat16)
        sums = source.sums(start, stop, values, rough=rough, even=even)
        shape = (form.rows, form.columns)
        rounded = None if rough is None else rough.view(shape)
        matrix = Dense(values.view(shape), sums.energy, rounded)
    else:
        sums = source.sums(start, stop, even=even)
        matrix = Streamed(source, start, stop, sums.energy)
    name = source.change.name if form.count == 1 else f"{source.change.name}[{number}]"
    key = key_of(state.wishes.seed, name)
    if auto:
        weights = None if even is None else even.weights()
        svd, above = update_of(source, start, matrix, values, sums, weights, key)
        return svd, above, sums
    svd = _svd(state, source.change, matrix, key)
    above = signal(clear(svd.values.tolist()), sums.noise, matrix.shape, svd.energy)
    return svd, above, sums


def _svd(state: _Run, change: Change, matrix: Dense | Streamed, key: int) -> Svd:
    """To the rank that was asked for, or that keeps enough of the energy."""
    rank = state.asked.get(change.name)
    if rank is not None:
        return truncated_svd(matrix, rank, key=key)
    tried = START // 2

    def enough(found: Svd) -> int | None:
        nonlocal tried
        tried *= 2
        values = clear(found.values.tolist())
        if len(values) < min(tried, *matrix.shape):
            return len(values)  # there is no more
        return rank_for_energy(values, found.energy, state.wishes.rule.value)

    return svd_until(matrix, enough, start=START, key=key)
