"""tuned − base of a tensor, block by block or as matrices that are multiplied."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from weft import native
from weft.core.errors import NumericsError
from weft.core.specs import Load, Merge, Scaled, children, leaves
from weft.core.sums import dot
from weft.execute._expressions import Evaluator
from weft.execute._rounding import NONE, Samples
from weft.native import Numbers
from weft.plan.layout import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from torch import Tensor

    from weft.core.specs import Expression
    from weft.decompose._rough import Rough
    from weft.decompose.even import Evening
    from weft.decompose.noise import Noise
    from weft.execute._blocks import Files, Workspace
    from weft.execute._expressions import Shared
    from weft.methods import Block
    from weft.plan.extract import Change

_TINY = 1e-28
_CANCELS = 1e-3


class Alone:
    """Does by itself what others would help with."""

    def map(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        return [task() for task in tasks]


@dataclass(frozen=True, slots=True)
class Sums:
    """Of some rows: ‖tuned‖², ‖tuned − base‖², and what rounding put into the difference.

    `grid` is the dtype whose numbers both are, where they are of one.
    """

    tuned: float
    energy: float
    noise: Noise = NONE
    grid: str | None = None


class Blocks(Protocol):
    """What is read by blocks of rows, as `Difference` is."""

    @property
    def columns(self) -> int:
        """Of each row."""

    def blocks(
        self, start: int, stop: int, into: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(first row, values, what else there is) of rows `start` to `stop`."""


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
        self.dtype = torch.float64 if wide else torch.float32
        self.rows = sum(each.rows for each in self._layouts)
        self.columns = self._layouts[0].columns
        self._evaluators: dict[int, Evaluator] = {}

    def _evaluator(self, number: int) -> Evaluator:
        """Of one part; those of the others are let go."""
        if number not in self._evaluators:
            files, workspace, shared = self._open
            self._evaluators = {
                number: Evaluator(
                    self.change.jobs[number].expression,
                    columns=self.columns,
                    together=self._layouts[number].together,
                    dtype=str(self.dtype).removeprefix("torch."),
                    files=files,
                    workspace=workspace,
                    shared=shared,
                    helpers=Alone(),
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

    def _squares(
        self,
        evaluator: Evaluator,
        expression: Expression,
        piece: tuple[int, int],
        into: tuple[Tensor | None, Tensor | None],
        samples: Samples,
    ) -> tuple[float, float]:
        """‖ΔW‖² and ‖W + ΔW‖² of some rows, which are left in both of `into` that are given."""
        out, rough = into
        block = _as_stored(evaluator, expression, *piece, out) if samples.stored else None
        if block is None:
            delta = evaluator.buffer("delta", piece[1] - piece[0]) if out is None else out
            base = _difference(evaluator, expression, *piece, delta)
        else:
            found = _squares_of_stored(block, *into)
            if found is not None:
                samples.add_stored(*_sides(block))
                return found
            delta, base = block.inputs[0], block.base
        if rough is not None:
            rough.copy_(delta)
        own, whole = _squares_of(delta, base)
        if not math.isfinite(own):
            self._check_finite(delta, base)
        if base is not None:
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


def _as_stored(
    evaluator: Evaluator, expression: Expression, first: int, last: int, out: Tensor | None
) -> Block | None:
    """Two tensors that compiled loops read, not widened yet: then into `out`; None of others."""
    if not isinstance(expression, Merge) or expression.base in expression.inputs:
        return None
    plain = all(isinstance(each, Load) for each in children(expression))
    if not (
        plain and evaluator.compiles and all(native.reads(r.dtype) for r in leaves(expression))
    ):
        return None
    return evaluator.block(expression, first, last, "", out)


def _sides(block: Block) -> tuple[Numbers, Numbers]:
    """Rows of the tuned tensor and of the base."""
    operands = block.operands()
    assert operands is not None
    tuned, base = operands[0].values, operands[0].less
    assert isinstance(tuned, Numbers)
    assert isinstance(base, Numbers)
    return tuned, base


def _squares_of_stored(
    block: Block, out: Tensor | None, rough: Tensor | None
) -> tuple[float, float] | None:
    """As `_squares_of`, ΔW in `out` and `rough`; None where float32 does not tell the squares."""
    operands = block.operands()
    assert operands is not None
    own, both, others = native.difference(operands[0], out, rough)
    if not own and _TINY < others < math.inf and _equal(*_sides(block)):
        return 0.0, others
    return _told(own, both, others)


def _equal(one: Numbers, other: Numbers) -> bool:
    """Bit for bit; of 0 and −0 it says no."""
    ours, theirs = (np.frombuffer(each.view, f"u{each.size}") for each in (one, other))
    return one.dtype == other.dtype and bool(np.array_equal(ours, theirs))


def _told(own: float, both: float, others: float) -> tuple[float, float] | None:
    """‖ΔW‖² and ‖W + ΔW‖², by ‖ΔW‖², ⟨ΔW, W⟩ and ‖W‖²; None if the squares leave float32."""
    whole = own + 2 * both + others
    # Where W and ΔW cancel, nothing of the sum's digits is left.
    return (own, whole) if own > _TINY and _CANCELS * (own + others) < whole < math.inf else None


def _squares_of(delta: Tensor, base: Tensor | None) -> tuple[float, float]:
    """‖ΔW‖² and ‖W + ΔW‖² of some rows."""
    if base is None:
        return squares(delta), squares(delta)
    if native.takes(delta, base):
        operands = [native.Operand(delta.view(-1)), native.Operand(base.view(-1))]
        (own,), (both, others) = native.gram(operands)
        if found := _told(own, both, others):
            return found
    return squares(delta), squares(base + delta)


def squares(values: Tensor) -> float:
    """Σ x², in float64 but for runs that float32 adds as well; infinite only where `values` are."""
    total = dot(values, values)
    if _TINY < total < math.inf or not bool(values.any()):
        return total
    # Squares of float32 numbers may be too large for it, or too small.
    return float(values.double().square().sum())


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


@dataclass(frozen=True)
class Streamed:
    """A matrix that is too large: every product reads it again.

    Attributes:
        source: Of which it is rows `start` to `stop`.
        energy: ‖A‖².
    """

    source: Blocks
    start: int
    stop: int
    energy: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.source.columns

    def matmul(self, X: Tensor) -> Tensor:
        out = torch.empty(self.shape[0], X.shape[1], dtype=X.dtype)
        for first, block, _ in self.source.blocks(self.start, self.stop):
            at = first - self.start
            right = X.to(block.device, block.dtype)
            out[at : at + len(block)].copy_(block @ right)
        return out

    def rmatmul(self, Y: Tensor) -> Tensor:
        out: Tensor | None = None
        for first, block, _ in self.source.blocks(self.start, self.stop):
            at = first - self.start
            rows = Y[at : at + len(block)].to(block.device, block.dtype)
            out = block.T @ rows if out is None else out.addmm_(block.T, rows)
        assert out is not None
        return out.cpu().to(Y.dtype)

    def rough(self) -> Rough | None:
        return None

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        for first, block, _ in self.source.blocks(self.start, self.stop):
            yield first - self.start, block.cpu()
