"""Generalised task arithmetic: sparsified task vectors, weighted, perhaps by vote, on the base.

dᵢ = xᵢ − b is sparsified, by `rescale` multiplied by ‖dᵢ‖₁ / ‖sparsified dᵢ‖₁, and eᵢ = wᵢ dᵢ. Then

- without consensus: m = Σ eᵢ and v = Σ wᵢ (1 where |v| < 1e-8);
- with it: only those eᵢ count in an element whose sign is that of Σ eᵢ (+ if that is 0; an eᵢ of 0
  never counts), m is their sum and v the sum of their weights (1 where v = 0);

and y = b + λ m, or b + λ m / v by `normalize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft import native
from weft.core.errors import Problem
from weft.methods import Parameter, _sparsify
from weft.native import Proof

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weft.methods import Block, Blocks, Task
    from weft.methods._sparsify import Keep
    from weft.native import Flat

_RUN = 64  # elements
LEAST_SUM = 1e-8  # of weights, by which nothing is divided below it
LEAST = 1e-7  # an L1 norm below it is that of nothing, and not rescaled to


def parameters(*, normalize: bool, rescale: bool, **more: Parameter) -> dict[str, Parameter]:
    """What all of these methods take, with their defaults, and what one has more."""
    return {
        "weight": Parameter("share of the model's task vector", each=True),
        "density": Parameter(
            "share of the task vector's elements that is kept, all from 1 on",
            float,
            1.0,
            True,
            low=0,
        ),
        **more,
        "lambda": Parameter("factor of the merged task vector", float, 1.0),
        "normalize": Parameter("divide by the sum of the weights that count", bool, normalize),
        "rescale": Parameter("give a task vector its L1 norm back", bool, rescale),
        "int8_mask": Parameter("accepted; it never changed the values", bool, False),
    }


def check_sum(weights: Sequence[float], parameter: str) -> Problem | None:
    """Weights that add up to 0, by which they are to be divided since `parameter` says so."""
    if abs(sum(weights)) > 1e-8 * sum(map(abs, weights)):  # 0.1 + 0.2 − 0.3 leaves some noise
        return None
    return Problem(
        f"the weights {', '.join(map(str, weights))} add up to 0, by which {parameter} divides",
        "give one of them another weight; or, to take them as they are, write\n"
        f"parameters:\n  {parameter}: false",
    )


@dataclass(frozen=True, slots=True)
class Part:
    """What becomes of one task vector: sparsified, then multiplied."""

    keep: Keep
    factor: float = 1.0


def rescaled(task: Task, blocks: Blocks, keeps: Sequence[Keep]) -> list[Part]:
    """Parts of the task vectors; by `rescale`, after a pass that takes the norms.

    That pass also records what it keeps, so that nothing is drawn or ranked a second time.
    """
    if not task.params["rescale"] or all(keep is _sparsify.everything for keep in keeps):
        return [Part(keep) for keep in keeps]

    def measure(block: Block) -> list[_Measured]:
        return [_measure(keep, block, number) for number, keep in enumerate(keeps)]

    measured = blocks.map(measure)
    parts = []
    for number, keep in enumerate(keeps):
        record = _sparsify.Recorded()
        own = [each[number] for each in measured]
        for _, _, start, count, bits in own:
            if bits is not None:
                record.add(start, count, bits)
        before, after = sum(each[0] for each in own), sum(each[1] for each in own)
        factor = before / after if min(before, after) >= LEAST else 1.0
        parts.append(Part(keep) if keep is _sparsify.everything else Part(record, factor))
    return parts


_Measured = tuple[float, float, int, int, "_sparsify.Array | None"]


def _measure(keep: Keep, block: Block, number: int) -> _Measured:
    """Σ |d| of an input and of what is kept of it, its first element, how many, and which."""
    operands = block.operands()
    if keep is _sparsify.everything:
        return 1.0, 1.0, block.start, block.count, None
    if operands is not None and isinstance(keep, _sparsify.Bernoulli):
        bits = keep.bits(block.start, block.count)
        norms = native.norms(operands[number], native.Keep(bits=bits))
        return *norms, block.start, block.count, bits
    values = block.inputs[number].reshape(-1)
    before = _norm(values.abs_())
    keep(block.start, values)
    bits = _sparsify.nonzero_bits(values)
    return before, _norm(values), block.start, len(values), bits


def _norm(magnitudes: Tensor) -> float:
    """Σ |d| in float64, but for runs of a few."""
    whole = magnitudes[: len(magnitudes) // _RUN * _RUN].view(-1, _RUN)
    rest = magnitudes[whole.numel() :].double().sum()
    return float(whole.sum(1).double().sum() + rest)


def merge(task: Task, parts: Sequence[Part], block: Block, *, consensus: bool) -> Tensor:
    """The rows y, in the memory of an input; the base itself where there is no input."""
    assert block.base is not None
    if not block.inputs:
        return block.base
    for part, each in zip(parts, block.inputs, strict=True):
        part.keep(block.start, each.reshape(-1))
    weights = [float(weight) for weight in task.of_each("weight")]
    shares = [weight * part.factor for weight, part in zip(weights, parts, strict=True)]
    scale = float(task.params["lambda"])
    normalize = bool(task.params["normalize"])
    if not consensus:
        for share, part, each in zip(factors(task, weights), parts, block.inputs, strict=True):
            each.mul_(share * part.factor)
        for each in block.inputs[1:]:
            block.inputs[0].add_(each)
        return block.inputs[0].add_(block.base)
    flat = [each.reshape(-1) for each in (block.base, *block.inputs)]
    step = _sparsify.PIECE if block.base.device.type == "cpu" else max(flat[0].numel(), 1)
    scratch = flat[0].new_empty(3, min(step, flat[0].numel()))
    for start in range(0, flat[0].numel(), step):
        base, *inputs = [each[start : start + step] for each in flat]
        for share, each in zip(shares, inputs, strict=True):
            each.mul_(share)
        _vote(inputs, weights if normalize else None, scratch[:, : len(base)])
        inputs[0].mul_(scale).add_(base)
    return block.inputs[0]


def factors(task: Task, weights: Sequence[float]) -> list[float]:
    """What the task vectors are multiplied with where none of them has a vote."""
    scale, total = float(task.params["lambda"]), sum(map(float, weights))
    if task.params["normalize"] and abs(total) >= LEAST_SUM:
        scale /= total
    return [float(weight) * scale for weight in weights]


def without_torch(task: Task) -> bool:
    """Of methods that draw at random: `norms` and `vote` are all, if something is kept of each."""
    return all(density > 0 for density in task.of_each("density"))


def compiled(
    task: Task, parts: Sequence[Part], block: Block, out: Flat, *, consensus: bool
) -> Proof | None:
    """`merge`, rounded into `out`; None where it is not to be had."""
    operands, base = block.operands(), block.base_operand()
    assert operands is not None
    assert base is not None
    keeps = [part.keep for part in parts]
    if len(operands) > native.MOST or not all(map(_sparsify.is_compiled, keeps)):
        return None
    weights = [float(weight) for weight in task.of_each("weight")]
    shares = weights if consensus else factors(task, weights)
    shares = [share * part.factor for share, part in zip(shares, parts, strict=True)]
    proof = Proof()
    for first, last in _sparsify.runs(keeps, block.start, block.start + out.numel()):
        here = slice(first - block.start, last - block.start)
        native.vote(
            [each.part(here) for each in operands],
            [_sparsify.compiled(keep, first, last - first) for keep in keeps],
            shares,
            weights if consensus and task.params["normalize"] else None,
            float(task.params["lambda"]) if consensus else 1.0,
            base.part(here),
            out[here],
            consensus=consensus,
            proof=proof,
        )
    return proof


def _vote(inputs: Sequence[Tensor], weights: Sequence[float] | None, scratch: Tensor) -> None:
    """Into the first of `inputs`: the sum of what the majority wants, or with weights its mean."""
    import torch

    sign, mixed, share = scratch
    sign.copy_(inputs[0])
    for each in inputs[1:]:
        sign.add_(each)
    sign.ge_(0).mul_(2).sub_(1)
    mixed.zero_()
    share.zero_()
    for number, each in enumerate(inputs):
        each.mul_(sign).clamp_(min=0)
        mixed.add_(each)
        if weights is not None:
            share.add_(each.gt_(0), alpha=weights[number])
    if weights is not None:
        # 1 where nothing counts, or what counts cancels.
        mixed.div_(share.add_(torch.eq(share, 0, out=inputs[-1])))
    torch.mul(mixed, sign, out=inputs[0])
