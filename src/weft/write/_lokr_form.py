"""How PEFT cuts a matrix into Kronecker factors, by the options of its LoKr."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weft.core.specs import Shape

Module = tuple["Shape", "Mapping[str, Shape]", int]


def lokr_config(modules: Sequence[Module]) -> dict[str, Any] | None:
    """The options with which PEFT makes factors of these shapes, if there are any.

    Args:
        modules: W's shape (out, in), that of each factor by role, and the rank.
    """
    factors = {-1}
    for _, shapes, _ in modules:
        factors |= set(shapes["w1"]) if "w1" in shapes else {shapes["w1_a"][0], shapes["w1_b"][1]}
    for factor in sorted(factors):
        for both in (False, True):
            if all(_shapes(weight, rank, factor, both=both) == s for weight, s, rank in modules):
                return {"decompose_factor": factor, "decompose_both": both}
    return None


def _shapes(weight: Shape, rank: int, factor: int, *, both: bool) -> dict[str, Shape]:
    """What PEFT makes: a factor is a product where the rank is below half of its longer side."""
    (a, c), (b, d) = _cut(weight[0], factor), _cut(weight[1], factor)
    one, two = rank < max(a, b) / 2 and both, rank < max(c, d) / 2
    return {
        **({"w1_a": (a, rank), "w1_b": (rank, b)} if one else {"w1": (a, b)}),
        **({"w2_a": (c, rank), "w2_b": (rank, d)} if two else {"w2": (c, d)}),
    }


def _cut(size: int, factor: int) -> tuple[int, int]:
    """`factor` and what is left, or the two divisors next to it, the smaller one first."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = max(n for n in range(1, limit + 1) if size % n == 0)
    return small, size // small
