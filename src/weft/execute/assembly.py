"""The bytes of an adapter's tensors, made one after another from what an extraction found."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import TYPE_CHECKING

import torch

from weft.core.dtypes import itemsize
from weft.core.errors import NumericsError
from weft.core.specs import Load, TensorJob
from weft.execute._blocks import Files, Workspace
from weft.execute._crew import Alone
from weft.execute._decomposed import decomposed_of, rounding
from weft.execute._expressions import Shared
from weft.execute._kernel import Kernel
from weft.plan.extract import tuned_of
from weft.plan.layout import shared_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from weft.plan._adapter_form import Entry
    from weft.plan.extract import Change

    _Made = tuple[list[tuple[Tensor, Tensor]], list[float]]

_CHUNK = 2**23  # bytes


class Assembly:
    """Makes the tensors of the file in its order, a few ahead of whoever writes them.

    Args:
        load: What was kept of a decomposition, by the tensor's name.
        scalings: Of each module.
        entries: The tensors of the file, in its order.
        threads: That may compute at once.

    Attributes:
        errors: Name -> ‖ΔW − scaling · B A‖² of each matrix, with the factors as they are written;
            of those that have been.
    """

    def __init__(
        self,
        load: Callable[[str], dict[str, Tensor]],
        scalings: Mapping[str, float],
        entries: Sequence[Entry],
        threads: int,
    ) -> None:
        self._load = load
        self._scalings = scalings
        self._files = Files()
        factors = [entry for entry in entries if entry.role != "value"]
        runs = (next(run) for _, run in groupby(factors, key=lambda each: each.change.name))
        self._ahead: deque[tuple[str, Future[_Made]]] = deque()
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self._submitted = ((run.change.name, self._pool.submit(self._made, run)) for run in runs)
        self._threads = threads
        self._last: tuple[str, list[tuple[Tensor, Tensor]]] | None = None
        self.errors: dict[str, list[float]] = {}

    def values(self, entry: Entry) -> Iterator[bytes]:
        """The bytes of one tensor, in pieces.

        Raises:
            NumericsError: It overflows the dtype that it is written in.
        """
        if entry.role == "value":
            yield from self._in_full(entry)
            return
        values = _arranged(entry, self._factors(entry)).contiguous()
        yield values.flatten().view(torch.uint8).numpy().tobytes()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.close()

    def _factors(self, entry: Entry) -> list[tuple[Tensor, Tensor]]:
        """Of each matrix, as they are written; made once for entries that follow each other."""
        name = entry.change.name
        if self._last is None or self._last[0] != name:
            self._last = None  # nobody needs both
            self._ahead.extend(islice(self._submitted, self._threads - len(self._ahead)))
            found, future = self._ahead.popleft()
            assert found == name
            written, self.errors[name] = future.result()
            self._last = name, written
        return self._last[1]

    def _made(self, entry: Entry) -> _Made:
        """(U √Σ, V √Σ) of each matrix, rounded, and what of ΔW they leave out."""
        name = entry.change.name
        found, scaling = decomposed_of(self._load(name)), self._scalings[name]
        exact = found.factors(entry.rank, scaling)
        dtype = getattr(torch, entry.dtype)
        written = [(left.to(dtype), right.to(dtype)) for left, right in exact]
        if not all(bool(each.isfinite().all()) for pair in written for each in pair):
            raise NumericsError(
                f"the factors of {name} overflow {entry.dtype}", "write --dtype bfloat16"
            )
        rounded = rounding(exact, written, scaling)
        left_out = found.spectrum.errors(entry.rank)
        return written, [a + b for a, b in zip(rounded, left_out, strict=True)]

    def _in_full(self, entry: Entry) -> Iterator[bytes]:
        change, expression = entry.change, tuned_of(entry.change)
        if isinstance(expression, Load) and expression.ref.dtype == entry.dtype:
            ref = expression.ref
            for start in range(ref.start, ref.stop, _CHUNK):
                piece = bytearray(min(_CHUNK, ref.stop - start))
                self._files.read(ref.file, start, memoryview(piece))
                yield bytes(piece)
            return
        job = TensorJob(change.name, entry.dtype, entry.shape, "", expression)
        shared = Shared(shared_at_once([job]))
        kernel = Kernel(job, self._files, Workspace(), shared, Alone())
        rows, width = kernel.layout.rows, kernel.layout.columns * itemsize(entry.dtype)
        step = max(kernel.layout.together, _CHUNK // max(width, 1))
        step -= step % kernel.layout.together
        for start in range(0, rows, step):
            yield bytes(kernel.run(start, min(rows, start + step), start * width)[0])


def _arranged(entry: Entry, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One factor, as PEFT lays it out."""
    form: Change = entry.change
    pairs = [pair[::-1] if form.form.turned else pair for pair in factors]
    if form.form.kind == "experts":
        if entry.role == "A":
            return torch.cat([A.T for _, A in pairs])
        # The expert runs fastest.
        return torch.stack([B for B, _ in pairs], -1).reshape(entry.shape)
    ((B, A),) = pairs
    # At the other end of a tied table the factors change places: (B A)ᵀ = Aᵀ Bᵀ.
    made = {"A": A.T, "B": B, "head_A": B.T, "head_B": A}[entry.role]
    return made.reshape(entry.shape)
