"""tuned − base of a tensor, block by block, and its sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.blocks import COMPARED, COMPILED
from weft.core.errors import NumericsError
from weft.core.lazy import torch
from weft.core.specs import Merge, Scaled, leaves
from weft.execute._crew import Alone
from weft.execute._expressions import Evaluator
from weft.execute._loops import reads
from weft.execute._rounding import NONE, Samples
from weft.execute._squares import as_stored, sides, squares_of, squares_of_stored
from weft.plan.layout import layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from weft.core.specs import Expression
    from weft.decompose.even import Evening
    from weft.decompose.noise import Noise
    from weft.execute._blocks import Files, Workspace
    from weft.execute._expressions import Shared
    from weft.plan.extract import Change


@dataclass(frozen=True, slots=True)
class Sums:
    """Of some rows: ‖tuned‖², ‖tuned − base‖², and what rounding put into the difference.

    `grid` is the dtype whose numbers both are, where they are of one.
    """

    tuned: float
    energy: float
    noise: Noise = NONE
    grid: str | None = None


class Difference:
    """The tensor of `change` as a matrix, in float32 (float64 where a model has it).

    Where the files have it in parts, their rows follow each other.
    """

    def __init__(self, change: Change, files: Files, workspace: Workspace, shared: Shared) -> None:
        self.change = change
        self._open = (files, workspace, shared)
        self._layouts = [layout(job) for job in change.jobs]
        refs = [ref for job in change.jobs for ref in leaves(job.expression)]
        wide = any(ref.dtype == "float64" for ref in refs)
        self._dtype = "float64" if wide else "float32"
        self.rows = sum(each.rows for each in self._layouts)
        self.columns = self._layouts[0].columns
        self._evaluators: dict[int, Evaluator] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the difference."""
        found: torch.dtype = getattr(torch, self._dtype)
        return found

    def _evaluator(self, number: int) -> Evaluator:
        """Of one part; those of the others are let go."""
        if number not in self._evaluators:
            files, workspace, shared = self._open
            self._evaluators = {
                number: Evaluator(
                    self.change.jobs[number].expression,
                    columns=self.columns,
                    together=self._layouts[number].together,
                    dtype=self._dtype,
                    files=files,
                    workspace=workspace,
                    shared=shared,
                    helpers=Alone(),
                    times=COMPARED if reads(self.change.jobs[number].expression) else COMPILED,
                )
            }
        return self._evaluators[number]

    def blocks(
        self, start: int, stop: int, into: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(first row, tuned − base, base) of rows `start` to `stop`.

        In buffers that are reused; the difference in the rows of `into`, if given.
        """
        for first, evaluator, expression, piece, out in self._pieces(start, stop, into):
            if out is None:
                out = evaluator.buffer("delta", piece[1] - piece[0])
            yield first, out, _difference(evaluator, expression, *piece, out)

    def _pieces(
        self, start: int, stop: int, into: Tensor | None
    ) -> Iterator[tuple[int, Evaluator, Expression, tuple[int, int], Tensor | None]]:
        """The blocks of rows `start` to `stop`: the first row, and which rows of what they are."""
        at = 0
        for number, (job, form) in enumerate(zip(self.change.jobs, self._layouts, strict=True)):
            low, high = max(start - at, 0), min(stop - at, form.rows)
            if low < high:
                evaluator = self._evaluator(number)
                for first, last in evaluator.cut(low, high):
                    here = slice(at + first - start, at + last - start)
                    out = None if into is None else into[here]
                    yield at + first, evaluator, job.expression, (first, last), out
            at += form.rows

    def sums(
        self,
        start: int,
        stop: int,
        into: Tensor | None = None,
        *,
        rough: Tensor | None = None,
        even: Evening | None = None,
    ) -> Sums:
        """Of rows `start` to `stop`.

        Args:
            start: The first row.
            stop: That after the last one.
            into: (rows, columns), for ΔW.
            rough: The same, bfloat16.
            even: Is shown how the noise is spread, where that is known.

        Raises:
            NumericsError: NaN or infinity.
        """
        tuned, energy = [], []
        samples = Samples(self.change, stop - start, self.columns, even)
        for first, evaluator, expression, piece, out in self._pieces(start, stop, into):
            here = slice(first - start, first - start + piece[1] - piece[0])
            also = None if rough is None else rough[here]
            own, whole = self._squares(evaluator, expression, piece, (out, also), samples)
            energy.append(own)
            tuned.append(whole)
            if samples.scaled:
                self._add_scales(samples, first, piece[1] - piece[0])
        square = math.fsum(energy)
        mean_square = square / max(1, (stop - start) * self.columns)
        return Sums(math.fsum(tuned), square, samples.noise(mean_square), samples.grid)

    def squares(self) -> tuple[float, float]:
        """‖ΔW‖² and ‖tuned‖².

        Raises:
            NumericsError: NaN or infinity.
        """
        found = [
            self._squares(evaluator, expression, piece, (None, None), None)
            for _, evaluator, expression, piece, _ in self._pieces(0, self.rows, None)
        ]
        return math.fsum(own for own, _ in found), math.fsum(whole for _, whole in found)

    def _squares(
        self,
        evaluator: Evaluator,
        expression: Expression,
        piece: tuple[int, int],
        into: tuple[Tensor | None, Tensor | None],
        samples: Samples | None,
    ) -> tuple[float, float]:
        """‖ΔW‖² and ‖W + ΔW‖² of some rows, which are left in both of `into` that are given."""
        out, rough = into
        stored = samples is None or samples.stored
        block = as_stored(evaluator, expression, *piece, out) if stored else None
        if block is None:
            delta = evaluator.buffer("delta", piece[1] - piece[0]) if out is None else out
            base = _difference(evaluator, expression, *piece, delta)
        else:
            found = squares_of_stored(block, *into)
            if found is not None:
                if samples is not None:
                    samples.add_stored(*sides(block))
                return found
            delta, base = block.inputs[0], block.base
        if rough is not None:
            rough.copy_(delta)
        own, whole = squares_of(delta, base)
        if not math.isfinite(own):
            self._check_finite(delta, base)
        if base is not None and samples is not None:
            samples.add("base", base)
            samples.add_tuned(base, delta)
        return own, whole

    def _add_scales(self, samples: Samples, first: int, count: int) -> None:
        """Of `count` rows from `first` on, for the sides that are float8."""
        number = 0
        while first >= self._layouts[number].rows:
            first -= self._layouts[number].rows
            number += 1
        merge = self.change.jobs[number].expression
        assert isinstance(merge, Merge)
        for what, side in (("tuned scale", merge.inputs[0]), ("base scale", merge.base)):
            if isinstance(side, Scaled):
                found = self._evaluator(number).scales(side, first, first + count)
                samples.add(what, found.expand(count, self.columns))

    def _check_finite(self, delta: Tensor, base: Tensor | None) -> None:
        name = self.change.name
        if base is not None and not bool(base.isfinite().all()):
            raise NumericsError(f"the base's {name} holds NaN or infinity", "check BASE's files")
        if not bool(delta.isfinite().all()):
            raise NumericsError(f"the tuned {name} holds NaN or infinity", "check TUNED's files")


def _difference(
    evaluator: Evaluator, expression: Expression, first: int, last: int, out: Tensor
) -> Tensor | None:
    """Rows of tuned − base into `out`; -> the base's."""
    if isinstance(expression, Merge):
        block = evaluator.block(expression, first, last, "", out)
        assert block.inputs[0] is out
        return block.base
    evaluator.evaluate(expression, first, last, out)
    return None
