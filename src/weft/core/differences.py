"""What two checkpoints A and B differ in, as frozen records: of a tensor, and of many together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weft.core.specs import Shape


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One name; what A lacks is None on the left, what B lacks on the right.

    Elements are compared as numbers: −0 equals 0, NaN in both equals NaN, and 0.5 in bfloat16
    equals 0.5 in float32. Where either is NaN or infinite, and they are not the same, the element
    counts as changed and stays out of the norms and the maximum.

    Attributes:
        name: Of the tensor.
        type: The name without the numbers of layers and experts.
        stack: The list of layers that it belongs to, such as `model.layers`; None outside of one.
        layer: Its number there.
        shapes: In A and in B.
        dtypes: In A and in B.
        changed: How many elements differ.
        difference: ‖A − B‖, Frobenius.
        base: ‖B‖, Frobenius; None where no element differs: it is not computed then.
        largest: max |A − B|.
        not_finite: NaN and infinite elements of A and of B, among the blocks that differ.
        rounds: The dtypes differ, and the wider side rounds to the narrower, element by element.
        rank: Stable rank of A − B, where it was asked for and the tensor is a matrix that changed.
    """

    name: str
    type: str
    stack: str | None
    layer: int | None
    shapes: tuple[Shape | None, Shape | None]
    dtypes: tuple[str | None, str | None]
    changed: int = 0
    difference: float = 0.0
    base: float | None = None
    largest: float = 0.0
    not_finite: tuple[int, int] = (0, 0)
    rounds: bool = False
    rank: float | None = None

    @property
    def compared(self) -> bool:
        """Both sides have it, in one shape."""
        return self.shapes[0] is not None and self.shapes[0] == self.shapes[1]

    @property
    def equal(self) -> bool:
        """Both sides have it, with the same values; the dtypes may differ."""
        return self.compared and not self.changed

    @property
    def elements(self) -> int:
        return math.prod((self.shapes[0] if self.shapes[0] is not None else self.shapes[1]) or ())

    @property
    def share(self) -> float:
        """Of the elements that differ."""
        return self.changed / max(self.elements, 1)

    @property
    def relative(self) -> float | None:
        """‖A − B‖ / ‖B‖; None where B is zero, or nothing differs."""
        return self.difference / self.base if self.base else None


@dataclass(frozen=True, slots=True)
class Together:
    """Several tensors: of one type, of one layer, or all.

    Attributes:
        name: Of the type, or the layer; `all`.
        tensors: That were compared.
        different: Of which some element differs.
        elements: Of all of them.
        changed: Of which differ.
        difference, base: ‖A − B‖ and ‖B‖ over the tensors that differ.
        largest: max |A − B|.
        rank: The median of their stable ranks.
    """

    name: str
    tensors: int
    different: int
    elements: int
    changed: int
    difference: float
    base: float
    largest: float
    rank: float | None

    @property
    def share(self) -> float:
        """Of the elements that differ, among those of all its tensors."""
        return self.changed / max(self.elements, 1)

    @property
    def relative(self) -> float | None:
        """‖A − B‖ / ‖B‖ over the tensors that differ; None where B is zero, or nothing differs."""
        return self.difference / self.base if self.base else None


def together(name: str, tensors: Iterable[TensorDifference]) -> Together:
    """Sums over those of `tensors` that were compared."""
    found = [each for each in tensors if each.compared]
    ranks = [each.rank for each in found if each.rank is not None]
    return Together(
        name,
        len(found),
        sum(not each.equal for each in found),
        sum(each.elements for each in found),
        sum(each.changed for each in found),
        math.hypot(*(each.difference for each in found)),
        math.hypot(*(each.base or 0.0 for each in found)),
        max((each.largest for each in found), default=0.0),
        median(ranks) if ranks else None,
    )


@dataclass(frozen=True)
class Diff:
    """What `diff` found.

    Attributes:
        a, b: As the user named them.
        tensors: Every name of either, in A's order, then B's.
        seconds: Of work, without the wait for torch.
        notes: How the two were brought together, and what they say of each other.
        warnings: Of the adapters in them.
        merged: A names B as the base that it was merged from, or B names A.
    """

    a: str
    b: str
    tensors: tuple[TensorDifference, ...] = field(repr=False)
    seconds: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    merged: bool = False

    @property
    def equal(self) -> bool:
        """Both have the same tensors, in the same shapes, with the same values."""
        return all(each.equal for each in self.tensors)

    @property
    def totals(self) -> Together:
        """Of all tensors that were compared."""
        return together("all", self.tensors)

    @property
    def types(self) -> list[Together]:
        """By type of module, in the order of the models."""
        return [together(*group) for group in _grouped((t.type, t) for t in self.tensors)]

    @property
    def layers(self) -> dict[str, list[Together]]:
        """Stack -> its layers, by number."""
        found: dict[str, list[Together]] = {}
        inside = [each for each in self.tensors if each.stack is not None]
        for stack, tensors in _grouped((t.stack or "", t) for t in inside):
            layers = dict(_grouped((str(t.layer), t) for t in tensors))
            found[stack] = [together(n, layers[n]) for n in sorted(layers, key=int)]
        return found


def _grouped(
    items: Iterable[tuple[str, TensorDifference]],
) -> list[tuple[str, list[TensorDifference]]]:
    groups: dict[str, list[TensorDifference]] = {}
    for key, each in items:
        groups.setdefault(key, []).append(each)
    return list(groups.items())
