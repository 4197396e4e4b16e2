"""Adapter kind -> how it changes a block of W: one file per kind, the file's name is the kind's.

W is seen as a matrix of `rows × columns`: dimension 0, and all others flattened, unless the kind
sees it otherwise. A kind says what it does to a block of rows; that is all the executor needs to
stream it.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape, TensorRef

    Blocks = Callable[[], Iterator[tuple[int, Tensor]]]


class Source(Protocol):
    """The tensors of one delta, widened to the arithmetic dtype and on the device.

    Attributes:
        shape: Of W: (outputs, inputs) where W is a matrix, also if it is stored transposed, unless
            the kind says that it deals with that itself.
        dtype: That W has on disk.
    """

    shape: Shape
    dtype: str

    def whole(self, role: str) -> Tensor:
        """The tensor of `role`; for factors, which are small. Integers come as int64."""

    def shared(self, role: str, make: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """As `whole`, for factors that many jobs use; not to be changed.

        With `make`, a function of a module, what that makes of it, once for all of them.
        """

    def rows(self, role: str, start: int, stop: int, out: Tensor) -> None:
        """Rows `start` to `stop` of `role` into `out`; for tensors as large as W."""


class DeltaKind(Protocol):
    """What a file in this folder defines."""

    # True: `block` gives ΔW. False: it gives the new weight, of which ΔW is the distance to W.
    ADDITIVE: bool

    # A kind may also define
    # - `add(state, weight, start, out)`: that adds weight · ΔW to `out`, in one pass;
    # - `square(state) -> float`: ‖ΔW‖² of the whole tensor in closed form, which saves the executor
    #   a pass over it;
    # - `together(shape, params) -> int`: that only so many rows at once, from a multiple of it on,
    #   can be computed (0: only all of them);
    # - `matrix(shape) -> (rows, columns)`: that it sees W otherwise;
    # - `SILENT`: roles of which one that is zero all over makes ΔW zero;
    # - `LASTING`: role -> the bytes per element of each form that `shared` keeps of it, for factors
    #   that modules of all layers use;
    # - `scratch(shape) -> int`: how many bytes `prepare` takes, beside its tensors, where many;
    # - `refusal(shapes, params, weight) -> str | None`: why there is no merged weight for this W;
    # - `across(changed) -> params`: what a delta must know of all tensors that its adapter changes
    #   by this kind, (delta, W's byte range) each; it is asked when the plan is made;
    # - `TRANSPOSES = True`: that it deals with `transposed` itself. Else W is handed to it as
    #   (outputs, inputs), all of it at once.

    def orientations(
        self, shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
    ) -> tuple[bool, ...]:
        """Whether the delta may lie transposed to W: the readings that its shapes allow, if any."""

    def prepare(self, delta: Delta, source: Source, blocks: Blocks) -> Any:
        """Load the small tensors, and take statistics over W's `blocks` where they are needed."""

    def block(self, state: Any, weight: Tensor, start: int, out: Tensor) -> None:
        """Write what the kind makes of the rows `weight` (from row `start` on) into `out`."""


@cache
def kind(name: str) -> DeltaKind:
    """The kind called `name`."""
    return cast("DeltaKind", importlib.import_module(f"{__name__}.{name}"))


def transposes(name: str) -> bool:
    """Whether the kind takes W as it is stored, and turns its own tensors instead."""
    return getattr(kind(name), "TRANSPOSES", False)


def silent(name: str) -> tuple[str, ...]:
    """Roles of which one that is zero all over makes ΔW zero."""
    return getattr(kind(name), "SILENT", ())


def across(name: str, changed: Sequence[tuple[Delta, TensorRef]]) -> Mapping[str, Param]:
    """What deltas of the kind must know of each other; most need nothing."""
    ask = getattr(kind(name), "across", None)
    return ask(changed) if ask else {}
