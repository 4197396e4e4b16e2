"""Factors of fused experts in the order in which PEFT of today has them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from weft.formats.checkpoint import bits
from weft.write.adapter import Made

if TYPE_CHECKING:
    from weft.core.specs import Delta, TensorRef


def as_today(
    A: TensorRef, B: TensorRef, experts: int, *, turned: bool, grouped: bool
) -> tuple[Made, Made]:
    """A (E · r, ·), an expert's rows together, and B (·, r · E), the expert running fastest.

    Args:
        A: (E · r, d1), as it lies.
        B: (d2, r · E), as it lies.
        experts: E.
        turned: A is for the outputs and B for the inputs: they change places, each transposed.
        grouped: B has the columns of an expert together.
    """
    shapes = (A.shape, B.shape)
    if turned:
        shapes = ((A.shape[0], B.shape[0]), (A.shape[1], B.shape[1]))
    values = partial(_values, A, B, experts, turned=turned, grouped=grouped)
    return (
        Made(A.dtype, shapes[0], lambda: values()[0]),
        Made(B.dtype, shapes[1], lambda: values()[1]),
    )


def _values(
    A: TensorRef, B: TensorRef, experts: int, *, turned: bool, grouped: bool
) -> tuple[bytes, bytes]:
    down = bits(A).reshape(experts, -1, A.shape[1])  # (E, r, d1)
    rank = down.shape[1]
    if grouped:
        up = bits(B).reshape(B.shape[0], experts, rank).transpose(1, 2, 0)
    else:
        up = bits(B).reshape(B.shape[0], rank, experts).transpose(2, 1, 0)
    if turned:  # (E, r, d2)
        down, up = up, down
    first = np.ascontiguousarray(down.reshape(experts * rank, -1))
    return first.tobytes(), np.ascontiguousarray(up.transpose(2, 1, 0)).tobytes()


@dataclass(frozen=True, slots=True)
class Stacked:
    """The factors of single experts, to be one pair for all of them.

    Attributes:
        places: (expert, part) -> A (r, in) and B (out, r).
        experts: How many there are, with and without factors.
        edges: First rank of each part, and behind the last.
    """

    places: dict[tuple[int, int], tuple[TensorRef, TensorRef]]
    experts: int
    edges: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.edges[-1]

    def factors(self, rank: int) -> tuple[Made, Made]:
        """A (E · rank, in) and B (parts · out, rank · E); zeros where there is nothing."""
        A, B = next(iter(self.places.values()))
        shapes = (self.experts * rank, A.shape[1]), (B.shape[0] * self._parts, rank * self.experts)
        return (
            Made(A.dtype, shapes[0], partial(self._down, rank, A)),
            Made(B.dtype, shapes[1], partial(self._up, rank, B)),
        )

    @property
    def _parts(self) -> int:
        return len(self.edges) - 1

    def _down(self, rank: int, like: TensorRef) -> bytes:
        values = np.zeros((self.experts, rank, like.shape[1]), bits(like).dtype)
        for (expert, part), (A, _) in self.places.items():
            values[expert, self.edges[part] : self.edges[part] + A.shape[0]] = bits(A)
        return values.tobytes()

    def _up(self, rank: int, like: TensorRef) -> bytes:
        outer = like.shape[0]
        values = np.zeros((outer * self._parts, rank, self.experts), bits(like).dtype)
        for (expert, part), (_, B) in self.places.items():
            ranks = slice(self.edges[part], self.edges[part] + B.shape[1])
            values[part * outer : (part + 1) * outer, ranks, expert] = bits(B)
        return values.tobytes()


def stacked(delta: Delta, experts: int) -> Stacked:
    """What a delta of the kind `lora_stacked` holds, of `experts` experts."""
    numbers, parts = delta.param("places", ()), delta.param("parts", 1)
    assert isinstance(numbers, tuple)
    assert isinstance(parts, int)
    refs = dict(delta.tensors)
    places = {
        (int(expert), int(part)): (refs[f"A.{n}"], refs[f"B.{n}"])
        for n, (expert, part) in enumerate(zip(numbers[::2], numbers[1::2], strict=True))
    }
    widest = [max((A.shape[0] for (_, p), (A, _) in places.items() if p == part), default=0)
              for part in range(parts)]  # fmt: skip
    return Stacked(places, experts, tuple(sum(widest[:n]) for n in range(parts + 1)))
