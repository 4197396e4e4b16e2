"""One job, block by block: evaluated, rounded once, and its proof taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from weft import native
from weft.core.errors import NumericsError
from weft.core.lazy import torch
from weft.core.specs import AddDeltas, Load, Merge, Rows, Scaled, TensorJob, leaves
from weft.core.sums import dot
from weft.execute._expressions import Evaluator
from weft.execute._held import hold
from weft.execute._operands import Reader
from weft.execute._soundness import culprit
from weft.execute._updates import in_one_pass, update
from weft.methods import Stored
from weft.native import Operand
from weft.plan.layout import layout

if TYPE_CHECKING:
    from torch import Tensor

    from weft.execute._blocks import Files, Workspace
    from weft.execute._expressions import Helpers, Shared
    from weft.execute._held import Pool
    from weft.methods import Block
    from weft.native import Numbers, Proof


@dataclass(frozen=True, slots=True)
class Sums:
    """Over some rows: ‖W‖², ‖ΔW‖², ‖(W′ − W) − ΔW‖², and whether any element is not the base's.

    Attributes:
        compared: There is a base, and so the above.
        sound: No element is NaN or infinite.
    """

    base: float = 0.0
    delta: float = 0.0
    error: float = 0.0
    changed: bool = False
    compared: bool = True
    sound: bool = True

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.base + other.base,
            self.delta + other.delta,
            self.error + other.error,
            self.changed or other.changed,
            self.compared and other.compared,
            self.sound and other.sound,
        )


class Kernel:
    """A job made ready: small factors in memory, statistics taken.

    Blocks may then run in any order and in any thread; each uses its own buffers of `workspace`.
    """

    def __init__(
        self,
        job: TensorJob,
        files: Files,
        workspace: Workspace,
        shared: Shared,
        helpers: Helpers,
        pool: Pool | None = None,
    ) -> None:
        self.job = job
        self.workspace = workspace
        self._files = files
        wide = {ref.dtype for ref in leaves(job.expression)} | {job.dtype}
        self.dtype = "float64" if "float64" in wide else "float32"
        self.layout = layout(job)
        compiled = self.dtype == "float32" and workspace.kind == "cpu"
        numel = self.layout.rows * self.layout.columns
        self._held = hold(job.expression, numel, pool) if compiled and pool else None
        self._evaluator = Evaluator(
            job.expression,
            columns=self.layout.columns,
            together=self.layout.together,
            dtype=self.dtype,
            files=files,
            workspace=workspace,
            shared=shared,
            helpers=helpers,
            held=self._held,
        )
        self._square = self._square_of()

    @property
    def closed_form(self) -> Sums:
        """What is known of the whole tensor without its blocks, and missing from their sums."""
        return Sums(delta=self._square or 0.0)

    def close(self) -> None:
        """All is done; the memory goes to others."""
        if self._held is not None:
            self._held.close()

    def run(self, start: int, stop: int, offset: int) -> tuple[memoryview, Sums]:
        """Rows `start` to `stop`: their bytes, for the place `offset` of a file, and their sums.

        The bytes stay valid until this thread runs again.

        Raises:
            NumericsError: NaN or infinity, or an overflow of the output dtype.
        """
        columns = self.layout.columns
        out = self.workspace.host("out", (stop - start) * columns, self.job.dtype, offset)
        found = [
            self._block(a, b, out[(a - start) * columns : (b - start) * columns])
            for a, b in self._evaluator.cut(start, stop)
        ]
        return out.view, reduce(Sums.__add__, found)

    def _block(self, start: int, stop: int, out: Numbers) -> Sums:
        """Rows `start` to `stop`, rounded into `out` on the host."""
        expression, rows = self.job.expression, stop - start
        match expression:
            case Load() | Scaled() | Rows():
                value = self._evaluator.buffer("weight", rows)
                self._evaluator.evaluate(expression, start, stop, value)
                if self._finished(value, None, None, out) is not None:
                    return Sums(compared=False)
                sound = self._check_cast(value, self._rounded(value, out))
                return Sums(compared=False, sound=sound)
            case AddDeltas():
                return self._updated(expression, start, stop, out)
            case Merge():
                block = self._evaluator.block(expression, start, stop, "")
                found = self._sums_of(self._evaluator.compiled(expression, block, out))
                return found or self._merged(self._evaluator.merged(expression, block), block, out)

    def _merged(self, value: Tensor, block: Block, out: Numbers) -> Sums:
        """What a method has made, rounded, and compared with the base if there is one."""
        found = self._finished(value, block.base_operand(), None, out)
        if found is not None:
            return found
        rounded = self._rounded(value, out)
        base = block.base
        if base is None:
            self._check_finite(value, rounded)
            return Sums(compared=False)
        delta = torch.sub(value, base, out=self._evaluator.buffer("delta", len(value)))
        return self._sums(base, delta, value, rounded)

    def _updated(self, expression: AddDeltas, start: int, stop: int, out: Numbers) -> Sums:
        """W + ΔW of adapters."""
        rows = stop - start
        reader = Reader(self._evaluator, start, stop)
        stored = reader.operand(expression.base, "weight", "b")
        base = stored.operand if isinstance(stored, Stored) else Operand(stored.view(-1))
        if self._square != 0 and in_one_pass(expression):
            # W need not be widened for its own sake.
            delta = reader.update(expression, "delta")
            found = self._finished(None, base, delta, out)
            if found is not None:
                return found
        delta = self._evaluator.buffer("delta", rows)
        value = self._evaluator.buffer("value", rows)
        weight = stored.widen() if isinstance(stored, Stored) else stored
        added = False  # whether W + ΔW is in `value`
        if self._square == 0:
            delta.zero_()
            value.copy_(weight)  # and not W + 0, which makes +0 of −0
            added = True
        else:
            added = update(self._evaluator, expression, start, weight, delta, value)
        found = self._finished(value if added else None, base, delta, out)
        if found is not None:
            return found
        if not added:
            torch.add(weight, delta, out=value)
        return self._sums(weight, delta, value, self._rounded(value, out))

    def _rounded(self, value: Tensor, out: Numbers) -> Tensor:
        """`value` in the dtype of `out`, which it is written to."""
        return self.workspace.narrow(value, out.tensor().view(value.shape))

    def _finished(
        self, value: Tensor | None, base: Operand | None, delta: Tensor | None, out: Numbers
    ) -> Sums | None:
        """Rounded into `out` and compared by compiled loops; None if that is not to be had."""
        if not native.takes(value, base, delta, out):
            return None
        exact = isinstance(self.job.expression, Merge)
        return self._sums_of(native.finish(value, base, delta, out, exact=exact))

    def _sums_of(self, proof: Proof | None) -> Sums | None:
        """None where something is not finite, and a closer look is needed."""
        if proof is None or proof.not_finite:
            return None
        if not math.isfinite(proof.base + proof.delta + proof.error):
            return None
        if not self._compared:
            return Sums(compared=False)
        delta = 0.0 if self._square is not None else proof.delta
        return Sums(proof.base, delta, proof.error, bool(proof.changed))

    @property
    def _compared(self) -> bool:
        """There is a base to compare with."""
        expression = self.job.expression
        if isinstance(expression, Merge):
            return expression.base is not None
        return isinstance(expression, AddDeltas)

    def bytes_read(self, rows: int) -> int:
        """What `rows` rows of the output cost to read, the small factors aside."""
        count = self.layout.rows * self.layout.columns
        large = [ref for ref in leaves(self.job.expression) if ref.numel == count]
        return sum(rows * ref.nbytes // max(self.layout.rows, 1) for ref in large)

    def _square_of(self) -> float | None:
        """‖ΔW‖² in closed form, where there is one."""
        expression = self.job.expression
        if not isinstance(expression, AddDeltas) or len(expression.deltas) != 1:
            return None
        kind, state = self._evaluator.state(expression.deltas[0])
        if not hasattr(kind, "square"):
            return None
        weight = float(expression.deltas[0].weight)
        square = float(kind.square(state)) * weight * weight
        return square if math.isfinite(square) else None

    # ---------------------------------------------------------------------------------- the proof

    def _sums(self, weight: Tensor, delta: Tensor, value: Tensor, rounded: Tensor) -> Sums:
        """Take the sums of squares, and look closer if one of them is not finite."""
        written = self.workspace.compute("written", value.shape[0], value.shape[1], value.dtype)
        written.copy_(rounded)
        changed = not torch.equal(written, weight)
        if isinstance(self.job.expression, Merge):
            error = written.sub_(value)
        else:
            # Not against W + ΔW as computed: that is rounded itself, by much of a small ΔW.
            error = written.sub_(weight).sub_(delta)
        update = 0.0 if self._square is not None else dot(delta, delta)
        sums = Sums(dot(weight, weight), update, dot(error, error), changed)
        if math.isfinite(sums.base + sums.delta + sums.error):
            return sums
        if isinstance(self.job.expression, Merge) and not value.isfinite().all():
            raise self._not_finite()
        if not weight.isfinite().all():
            raise NumericsError(
                f"the base's {self.job.name} holds NaN or infinity", "check the base model's files"
            )
        if not delta.isfinite().all():
            raise NumericsError(
                f"the update of {self.job.name} is NaN or infinite",
                "check the adapter's factors, and the weight that it is given",
            )
        self._check_cast(value, rounded)
        # Finite, but too large for the squares of this dtype: rare enough to do again in float64.
        wide = weight.double(), delta.double(), rounded.double()
        error = wide[2] - wide[0] - wide[1]
        update = 0.0 if self._square is not None else dot(wide[1], wide[1])
        return Sums(dot(wide[0], wide[0]), update, dot(error, error), changed)

    def _check_finite(self, value: Tensor, rounded: Tensor) -> None:
        if not self._check_cast(value, rounded):
            raise self._not_finite()

    def _not_finite(self) -> NumericsError:
        """Of the tensor that a method has made: whose NaN or infinity it is."""
        found = culprit(leaves(self.job.expression), self._files, self.workspace)
        return found or NumericsError(
            f"{self.job.name} comes out as NaN or infinity",
            "check the parameters of the recipe: weights may be too large, or add up to zero",
        )

    def _check_cast(self, exact: Tensor, rounded: Tensor) -> bool:
        """Whether all numbers are finite; none may have become infinite."""
        if not exact.numel() or not rounded.is_floating_point():
            return True
        low, high = torch.aminmax(exact)  # NaN, where there is one
        if max(-float(low), float(high)) < torch.finfo(rounded.dtype).max:
            return True
        new = rounded.isinf() & ~exact.isinf()
        if new.any():
            largest = exact[new].abs().max().item()
            raise NumericsError(
                f"{self.job.name} overflows {self.job.dtype}: it reaches {largest:.4g}",
                "write bfloat16 or float32: --dtype bfloat16 in weft merge, and for weft run "
                "`out_dtype: bfloat16` in the recipe",
            )
        return bool(exact.isfinite().all())
