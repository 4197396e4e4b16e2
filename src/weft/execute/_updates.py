"""What deltas make of a block of W."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from weft import deltas
from weft.core.lazy import torch
from weft.core.specs import AddDeltas, Delta, Expression

if TYPE_CHECKING:
    from torch import Tensor

    from weft.execute._expressions import Evaluator


def add_deltas(
    evaluator: Evaluator,
    expression: AddDeltas,
    start: int,
    weight: Tensor,
    delta: Tensor,
    value: Tensor,
) -> None:
    """`value` = W + ΣwᵢΔWᵢ and `delta` = ΣwᵢΔWᵢ for the block `weight`."""
    if not update(evaluator, expression, start, weight, delta, value):
        torch.add(weight, delta, out=value)


def update(
    evaluator: Evaluator,
    expression: AddDeltas,
    start: int,
    weight: Tensor,
    delta: Tensor,
    value: Tensor,
) -> bool:
    """`delta` = ΣwᵢΔWᵢ for the block `weight`; true if `value` is W + ΣwᵢΔWᵢ already."""
    first, *rest = expression.deltas
    additive = deltas.kind(first.kind).ADDITIVE
    if not rest and first.weight == 1 and not additive:
        _run_kind(evaluator, first, start, weight, value)
        torch.sub(value, weight, out=delta)
        return True
    if rest and not all(deltas.kind(each.kind).ADDITIVE for each in expression.deltas):
        # Several may take W's place together (0.7 and 0.3 of two heads). Where |W| ≫ |v|, v − W
        # loses v in float32; in float64 it keeps it, and is 0 still where v equals W.
        rows, columns = weight.shape
        total = evaluator.workspace.compute("total", rows, columns, torch.float64).zero_()
        for each in expression.deltas:
            _run_kind(evaluator, each, start, weight, value)
            total.add_(value, alpha=each.weight)
            if not deltas.kind(each.kind).ADDITIVE:
                total.sub_(weight, alpha=each.weight)
        delta.copy_(total)
        value.copy_(total.add_(weight))
        return True
    _add_one(evaluator, first, start, weight, delta)
    if first.weight != 1:
        delta.mul_(first.weight)
    for other in rest:
        _add_one(evaluator, other, start, weight, value)
        delta.add_(value, alpha=other.weight)
    return False


def _add_one(evaluator: Evaluator, delta: Delta, start: int, weight: Tensor, out: Tensor) -> None:
    _run_kind(evaluator, delta, start, weight, out)
    if not deltas.kind(delta.kind).ADDITIVE:
        out.sub_(weight)


def _run_kind(evaluator: Evaluator, delta: Delta, start: int, weight: Tensor, out: Tensor) -> None:
    kind, state = evaluator.state(delta)
    if turned(delta):
        weight, out = weight.T, out.T
    kind.block(state, weight, start, out)


def add_update(
    evaluator: Evaluator,
    expression: Expression,
    start: int,
    weight: Tensor,
    out: Tensor,
    factor: float,
    path: str,
) -> None:
    """`out` += factor · ΣwᵢΔWᵢ, if the expression has deltas; `weight` is what they change."""
    if in_one_pass(expression):
        for each in expression.deltas:
            kind, state = evaluator.state(each)
            kind.add(state, factor * each.weight, start, out)  # type: ignore[attr-defined]
    elif isinstance(expression, AddDeltas):
        delta = evaluator.buffer(f"{path}delta", len(out))
        value = evaluator.buffer(f"{path}value", len(out))
        update(evaluator, expression, start, weight, delta, value)
        out.add_(delta, alpha=factor)


def in_one_pass(expression: Expression) -> TypeGuard[AddDeltas]:
    """All of its deltas can be added to what is there."""
    return isinstance(expression, AddDeltas) and all(
        hasattr(deltas.kind(each.kind), "add") and not turned(each) for each in expression.deltas
    )


def turned(delta: Delta) -> bool:
    """W is stored (inputs, outputs), and the kind wants it the other way round."""
    return bool(delta.param("transposed", False)) and not deltas.transposes(delta.kind)
