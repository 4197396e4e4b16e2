"""RoAd (arXiv:2409.00119): W′ = R @ W and b′ = R @ b, R turning pairs of outputs.

The outputs lie in groups of `group`; the first half of a group is paired with the second. A pair
(x, y) becomes (c₁x − s₁y, c₂y + s₂x) with c = α cos θ and s = α sin θ. `theta` and `alpha` hold
one value per pair (`variant` 1: α and θ are those of both), one per output (2), or two, for each
group first those of the cosines, then those of the sines (4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = False


@dataclass(frozen=True, slots=True)
class State:
    """Factor of each output, and of the other one of its pair, both (groups, 2, group / 2, 1)."""

    own: Tensor
    other: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    group, variant = params["group"], params["variant"]
    assert isinstance(group, int)
    assert isinstance(variant, int)
    if len(weight) not in (1, 2) or weight[0] % group:
        return ()
    return (False,) if shapes["theta"] == (weight[0] * variant // 2,) else ()


def together(shape: Shape, params: Mapping[str, Param]) -> int:
    return int(params["group"])  # type: ignore[arg-type]


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    half = int(delta.param("group", 0)) // 2  # type: ignore[arg-type]
    theta, alpha = source.whole("theta"), source.whole("alpha")
    cosines, sines = alpha * theta.cos(), alpha * theta.sin()
    if delta.param("variant", 1) == 4:
        cosines = cosines.view(-1, 2, 2, half)[:, 0]
        sines = sines.view(-1, 2, 2, half)[:, 1]
    elif delta.param("variant", 1) == 1:
        cosines, sines = (v.view(-1, 1, half).expand(-1, 2, -1) for v in (cosines, sines))
    else:
        cosines, sines = (v.view(-1, 2, half) for v in (cosines, sines))
    signs = sines.new_tensor([-1.0, 1.0])[:, None]
    return State(cosines[..., None], (sines * signs)[..., None])


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    groups, columns = weight.shape[0] // (2 * state.own.shape[2]), weight.shape[1]
    first = start // (2 * state.own.shape[2])
    here = slice(first, first + groups)
    pairs = weight.view(groups, 2, -1, columns)
    turned = pairs * state.own[here] + pairs.flip(1) * state.other[here]
    out.copy_(turned.view_as(out))
