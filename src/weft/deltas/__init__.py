"""Adapter kind -> how it changes a block of W: one file per kind, the file's name is the kind's.

W is seen as a matrix of `rows × columns`: dimension 0, and all others flattened. A kind says what
it does to a block of rows; that is all the executor needs to stream it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape

    Blocks = Callable[[], Iterator[tuple[int, Tensor]]]


class Source(Protocol):
    """The tensors of one delta, widened to the arithmetic dtype and on the device."""

    def whole(self, role: str) -> Tensor:
        """The tensor of `role`; for factors, which are small."""

    def rows(self, role: str, start: int, stop: int, out: Tensor) -> None:
        """Rows `start` to `stop` of `role` into `out`; for tensors as large as W."""


class DeltaKind(Protocol):
    """What a file in this folder defines."""

    # True: `block` gives ΔW. False: it gives the new weight, of which ΔW is the distance to W.
    ADDITIVE: bool

    # A kind may also define `square(state) -> float`: ‖ΔW‖² of the whole tensor in closed form,
    # which saves the executor a pass over it.

    def orientations(
        self, shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
    ) -> tuple[bool, ...]:
        """Whether the delta may lie transposed to W: the readings that its shapes allow, if any."""

    def prepare(self, delta: Delta, source: Source, blocks: Blocks) -> Any:
        """Load the small tensors, and take statistics over W's `blocks` where they are needed."""

    def block(self, state: Any, weight: Tensor, start: int, out: Tensor) -> None:
        """Write what the kind makes of the rows `weight` (from row `start` on) into `out`."""


def kind(name: str) -> DeltaKind:
    """The kind called `name`."""
    return cast("DeltaKind", importlib.import_module(f"{__name__}.{name}"))
