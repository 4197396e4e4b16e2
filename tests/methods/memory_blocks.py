"""Merging tensors in memory, cut in any way: what `weft.methods` asks of an executor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weft import methods
from weft.methods import Block, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from merge_cases import Case


@dataclass
class MemoryBlocks:
    """Blocks of tensors in memory, of about `size` elements, or cut at `edges` (rows)."""

    own: methods.Method
    base: torch.Tensor | None
    inputs: Sequence[torch.Tensor]
    columns: int
    size: int
    passes: float = 0  # over all elements

    def edges(self) -> list[tuple[int, int]]:
        rows = math.prod(self.shape) // max(self.columns, 1)
        step = max(self.size // max(self.columns, 1), 1)
        whole = max(methods.together(self.own, self.shape) // max(self.columns, 1), 1)
        step = -(-step // whole) * whole
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    @property
    def shape(self) -> tuple[int, ...]:
        like = self.inputs[0] if self.inputs else self.base
        assert like is not None
        return tuple(like.shape)

    def block(self, start: int, stop: int) -> Block:
        first, last = start * self.columns, stop * self.columns

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.reshape(-1)[first:last].clone().view(stop - start, self.columns)

        base = None if self.base is None else rows(self.base)
        inputs = [rows(each) for each in self.inputs]
        if base is not None and self.own.TASK_VECTORS:
            inputs = [each.sub_(base) for each in inputs]
        return Block(first, base, list(inputs))

    def map(
        self,
        function: Callable[[Block], Any],
        sample: int | None = None,
        only: Collection[int] | None = None,
    ) -> list[Any]:
        pieces = self.edges()
        numel = math.prod(self.shape)
        if sample is not None and sample < numel:
            pieces = [(a, a + max(1, int((b - a) * sample / numel))) for a, b in pieces]
        if only is not None:
            pieces = [piece for number, piece in enumerate(pieces) if number in only]
        self.passes += sum(b - a for a, b in pieces) * self.columns / max(numel, 1)
        # A thread may take any block at any time.
        order = np.random.RandomState(len(pieces)).permutation(len(pieces))
        found = {int(n): function(self.block(*pieces[n])) for n in order}
        return [found[n] for n in range(len(pieces))]


def task_of(
    method: str,
    shape: tuple[int, ...],
    count: int,
    params: dict[str, Any],
    each: dict[str, list[Any]],
    key: str = "seed",
) -> Task:
    """A task with the defaults filled in."""
    own = methods.method(method)
    shared = {name: p.default for name, p in own.PARAMETERS.items() if not p.each}
    per = [{name: p.default for name, p in own.PARAMETERS.items() if p.each} for _ in range(count)]
    for name, values in each.items():
        for n, value in enumerate(values):
            per[n][name] = value
    columns = shape[-1] if len(shape) > 1 else 1
    return Task(shape, columns, count, {**shared, **params}, tuple(per), key)


def merge(
    method: str,
    base: torch.Tensor | None,
    inputs: Sequence[torch.Tensor],
    params: dict[str, Any] | None = None,
    each: dict[str, list[Any]] | None = None,
    *,
    size: int = 2**19,
    run_size: int | None = None,
    key: str = "seed",
) -> torch.Tensor:
    """The merged tensor; statistics over blocks of `size` elements, the result over `run_size`."""
    own = methods.method(method)
    like = inputs[0] if inputs else base
    assert like is not None
    shape = tuple(like.shape)
    task = task_of(method, shape, len(inputs), params or {}, each or {}, key)
    assert methods.check(own, task) is None
    if own.ROWS and len(shape) < 2:
        size = run_size = like.numel()
    blocks = MemoryBlocks(own, base, inputs, task.columns, size)
    state = methods.prepare(own, task, blocks)
    blocks.size = run_size or size
    parts = [_merged(own, task, state, blocks, piece).reshape(-1) for piece in blocks.edges()]
    return torch.cat([part.clone() for part in parts]).view(shape)


def _merged(
    own: methods.Method, task: Task, state: Any, blocks: MemoryBlocks, piece: tuple[int, int]
) -> torch.Tensor:
    """By compiled loops where there are any, as an executor does it."""
    block = blocks.block(*piece)
    like = block.inputs[0] if block.inputs else block.base
    assert like is not None
    out = torch.empty_like(like)
    if methods.compiled(own, task, state, block, out.view(-1)) is not None:
        return out
    return methods.merged(own, task, state, block)


def merge_case(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    from merge_cases import tensors

    base, inputs = tensors(case)
    return merge(
        case.method,
        None if base is None else torch.from_numpy(base).to(dtype),
        [torch.from_numpy(each).to(dtype) for each in inputs],
        case.params,
        case.each,
        **options,
    )
