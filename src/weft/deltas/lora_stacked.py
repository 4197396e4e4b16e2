"""LoRA on single experts, for a tensor that holds them all: W (E, parts · out, in).

`A.n` (r, in) and `B.n` (out, r) are those of the expert `places[2n]`, of its part `places[2n + 1]`
(the gate, then the up projection). `exchanged`: W is (E, in, parts · out). `scalings`, if there are
several, has one for each n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.deltas._experts import Stack, matrix, together

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

__all__ = ["ADDITIVE", "block", "matrix", "orientations", "prepare", "square", "together"]

ADDITIVE = True


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    places, parts = params["places"], params["parts"]
    assert isinstance(places, tuple)
    assert isinstance(parts, int)
    if len(weight) != 3 or max(places[::2]) >= weight[0]:
        return ()
    for n in range(len(places) // 2):
        sides = (shapes[f"B.{n}"][0] * parts, shapes[f"A.{n}"][1])
        if weight[1:] != (sides[::-1] if params["exchanged"] else sides):
            return ()
    return (False,)


def prepare(delta: Delta, source: Source, blocks: Blocks) -> Stack:
    """The factors of an expert's parts as one pair: A over each other, B along the diagonal."""
    places = delta.param("places", ())
    assert isinstance(places, tuple)
    scalings = delta.param("scalings", (1.0,) * (len(places) // 2))
    assert isinstance(scalings, tuple)
    exchanged, parts = bool(delta.param("exchanged", False)), delta.param("parts", 1)
    assert isinstance(parts, int)
    shapes = {role: ref.shape for role, ref in delta.tensors}
    ranks: dict[tuple[int, int], int] = {}
    for n, place in enumerate(zip(places[::2], places[1::2], strict=True)):
        ranks[int(place[0]), int(place[1])] = shapes[f"A.{n}"][0]
    widest = [
        max((r for (_, p), r in ranks.items() if p == part), default=0) for part in range(parts)
    ]
    edges = [sum(widest[:part]) for part in range(parts + 1)]
    outer, inner = shapes["B.0"][0], shapes["A.0"][1]
    left = source.whole("A.0").new_zeros(source.shape[0], outer * parts, edges[-1])
    right = left.new_zeros(source.shape[0], edges[-1], inner)
    for n, (expert, part) in enumerate(ranks):
        rank = ranks[expert, part]
        columns = slice(edges[part], edges[part] + rank)
        left[expert, part * outer : (part + 1) * outer, columns] = (
            source.whole(f"B.{n}") * scalings[n]
        )
        right[expert, columns] = source.whole(f"A.{n}")
    if exchanged:
        left, right = right.transpose(1, 2).contiguous(), left.transpose(1, 2).contiguous()
    return Stack(left, right, delta.scaling)


def square(state: Stack) -> float:
    return state.square()


def block(state: Stack, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)
