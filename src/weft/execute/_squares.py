"""‖ΔW‖² and ‖W + ΔW‖² of rows: in one compiled loop over what is stored, where there is one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from weft import native
from weft.core.sums import dot
from weft.execute._loops import reads
from weft.native import Numbers

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import Expression
    from weft.execute._expressions import Evaluator
    from weft.methods import Block

_TINY = 1e-28
_CANCELS = 1e-3


def as_stored(
    evaluator: Evaluator, expression: Expression, first: int, last: int, out: Tensor | None
) -> Block | None:
    """Two tensors that compiled loops read, not widened yet: then into `out`; None of others."""
    if not (evaluator.compiles and reads(expression)):
        return None
    return evaluator.block(expression, first, last, "", out)


def sides(block: Block) -> tuple[Numbers, Numbers]:
    """Rows of the tuned tensor and of the base."""
    operands = block.operands()
    assert operands is not None
    tuned, base = operands[0].values, operands[0].less
    assert isinstance(tuned, Numbers)
    assert isinstance(base, Numbers)
    return tuned, base


def squares_of_stored(
    block: Block, out: Tensor | None, rough: Tensor | None
) -> tuple[float, float] | None:
    """As `squares_of`, ΔW in `out` and `rough`; None where float32 does not tell the squares."""
    operands = block.operands()
    assert operands is not None
    own, both, others = native.difference(operands[0], out, rough)
    if not own and _TINY < others < math.inf and _equal(*sides(block)):
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


def squares_of(delta: Tensor, base: Tensor | None) -> tuple[float, float]:
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
