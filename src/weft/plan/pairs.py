"""Two models, side by side: which tensor of the one is compared with which of the other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.errors import WeftError
from weft.plan._stacks import place

if TYPE_CHECKING:
    from collections.abc import Callable

    from weft.core.specs import TensorJob
    from weft.plan._stacks import Stack
    from weft.plan._views import View


@dataclass(frozen=True, slots=True)
class Pair:
    """A name, and what each side has under it; None where it has nothing.

    Attributes:
        name: Of the tensor.
        type: The name without the numbers of layers and experts.
        stack, layer: Where it belongs, if it is in a list of layers.
        a, b: The tensors.
    """

    name: str
    type: str
    stack: str | None
    layer: int | None
    a: TensorJob | None
    b: TensorJob | None

    @property
    def comparable(self) -> bool:
        """Both sides have it, in one shape."""
        return self.a is not None and self.b is not None and self.a.shape == self.b.shape

    @property
    def jobs(self) -> tuple[TensorJob, TensorJob]:
        """Both tensors, of a pair that is comparable."""
        assert self.a is not None
        assert self.b is not None
        return self.a, self.b


def pairs(a: View, b: View, wanted: Callable[[str], bool]) -> tuple[list[Pair], list[str]]:
    """Every tensor of either model that is `wanted`, and notes on how they were brought together.

    A head that is tied in one model and apart in the other is the embedding of the first.

    Raises:
        WeftError: No name is wanted.
    """
    names = dict.fromkeys([*a.tensors, *b.tensors])
    chosen = [name for name in names if wanted(name)]
    if not chosen:
        raise WeftError(
            f"the filter matches none of the {len(names)} tensors of {a.name} and {b.name}",
            f"their names are like {next(iter(names), '')}",
        )
    known = list(dict.fromkeys([*a.stacks, *b.stacks]))
    alone = len({stack.path for stack in known}) == 1
    found = [_pair(name, a, b, known, alone=alone) for name in chosen]
    return found, [*_said_of_ties(a, b, chosen), *_said_of_ties(b, a, chosen)]


def _pair(name: str, a: View, b: View, known: list[Stack], *, alone: bool) -> Pair:
    home = place(name, known)
    rest = re.sub(r"(?<=\.)\d+(?=\.)", "*", home.rest)
    if home.stack is None:
        return Pair(name, rest, None, None, a.tensor(name), b.tensor(name))
    kind = rest if alone else f"{home.stack.path}.*.{rest}"
    return Pair(name, kind, home.stack.path, home.layer, a.tensor(name), b.tensor(name))


def _said_of_ties(one: View, other: View, chosen: list[str]) -> list[str]:
    tie = one.tie
    if tie is None:
        return []
    notes = []
    if tie.head in other.tensors and tie.head in chosen:
        notes.append(
            f"{tie.head} of {one.name} is tied to {tie.embedding}, and a tensor of its own in "
            f"{other.name}: they are compared so"
        )
    if tie.stored:
        notes.append(
            f"{tie.head} in the files of {one.name} is not looked at: its config ties the head to "
            f"{tie.embedding}"
        )
    return notes
