"""Merge methods: one file each, the file's name is the `merge_method` of a recipe.

A method is *statistics over blocks, then a map over blocks*: `prepare` may go over the tensors as
often as it must, and `block` makes some rows of the output from the same rows of the inputs. That
is all the executor needs to stream it, whatever the size of the tensors. Tensors are matrices of
some rows; nothing but a method that says `ROWS` may depend on where they are cut.

The catalogue is read without torch: a file imports it only inside its functions.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from weft import native
from weft.native import Operand, Proof

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

    from weft.core.errors import Problem
    from weft.core.specs import Param, Shape
    from weft.native import Flat

    T = TypeVar("T")


FLOAT32 = 3.4028235e38  # the largest; the arithmetic knows none beyond it


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a recipe may set.

    Attributes:
        what: One line for `weft methods`.
        type: `float`, `int`, `bool` or `str`.
        default: None where the recipe must say it, unless `optional`.
        each: Every input has one of its own; else all share one.
        base_too: The base has one as well, where it is among the inputs.
        optional: None is a value.
        low, high: What a number must lie between, both included; beyond them the formula gives
            nothing that anybody could mean.
    """

    what: str
    type: type = float
    default: Param | None = None
    each: bool = False
    base_too: bool = False
    optional: bool = False
    low: float = -math.inf
    high: float = math.inf

    @property
    def required(self) -> bool:
        return self.default is None and not self.optional

    @property
    def range(self) -> str | None:
        """`from 0 to 1`, `0 or more`, or None where any number will do."""
        if math.isfinite(self.high):
            return f"from {self.low:g} to {self.high:g}"
        return f"{self.low:g} or more" if math.isfinite(self.low) else None

    def allows(self, value: object) -> bool:
        """Whether the value lies in the range, and is a number of float32."""
        if not isinstance(value, int | float):
            return True
        return self.low <= value <= self.high and abs(value) <= FLOAT32


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor to be merged.

    Attributes:
        shape: Of the tensor.
        columns: Of the matrix that its blocks are rows of.
        count: How many inputs there are, the base aside.
        params: Shared parameters, all of them.
        each: Those of every input.
        key: What random numbers are drawn by, beside the input's number and the element's.
    """

    shape: Shape
    columns: int
    count: int
    params: Mapping[str, Any] = field(default_factory=dict)
    each: tuple[Mapping[str, Any], ...] = ()
    key: str = ""

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def of_each(self, name: str) -> list[Any]:
        """The parameter `name` of every input."""
        return [params[name] for params in self.each]


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows as they lie on disk, until somebody wants them in the arithmetic dtype.

    Attributes:
        operand: What compiled loops read.
        widen: -> the rows, as a matrix.
    """

    operand: Operand
    widen: Callable[[], Tensor]


class Block:
    """Some rows of every tensor.

    Args:
        start: The first element, counted in the whole tensor.
        base: Rows of the base, if there is one.
        inputs: Rows of the inputs; more may be added to the list until they are asked for.
    """

    def __init__(
        self, start: int, base: Tensor | Stored | None, inputs: list[Tensor | Stored]
    ) -> None:
        self.start = start
        self._base = base
        self._inputs = inputs
        self._wide_base: Tensor | None = None
        self._wide: list[Tensor] | None = None

    @property
    def base(self) -> Tensor | None:
        """Rows of the base in the arithmetic dtype; not to be changed. None if there is none."""
        if self._wide_base is None and self._base is not None:
            self._wide_base = _widened(self._base)
        return self._wide_base

    @property
    def inputs(self) -> list[Tensor]:
        """Rows of the inputs: x, or x − base for a method of `TASK_VECTORS`.

        In the arithmetic dtype. A method may write over them: nobody reads them again.
        """
        if self._wide is None:
            self._wide = [_widened(each) for each in self._inputs]
        return self._wide

    @property
    def count(self) -> int:
        """Elements of each."""
        first = self._inputs[0] if self._inputs else self._base
        assert first is not None
        return _operand(first).values.numel()

    def operands(self) -> list[Operand] | None:
        """The inputs for compiled loops, in whatever dtype they are; None if those take others."""
        found = [_operand(each) for each in self._inputs]
        return found if native.takes(*found) else None

    def base_operand(self) -> Operand | None:
        """The base's rows for compiled loops."""
        return None if self._base is None else _operand(self._base)


def _widened(rows: Tensor | Stored) -> Tensor:
    return rows.widen() if isinstance(rows, Stored) else rows


def _operand(rows: Tensor | Stored) -> Operand:
    return rows.operand if isinstance(rows, Stored) else Operand(rows.reshape(-1))


class Blocks(Protocol):
    """All blocks of a tensor."""

    def map(
        self,
        function: Callable[[Block], T],
        sample: int | None = None,
        only: Collection[int] | None = None,
    ) -> list[T]:
        """`function` of every block, in the order of the rows; several run at once.

        `sample`: of about so many elements only, spread over the tensor.
        `only`: of the blocks with these numbers; every `map` without `sample` cuts alike.
        """


class Method(Protocol):
    """What a file in this folder defines."""

    USE_WHEN: str  # one line
    PARAMETERS: dict[str, Parameter]
    BASE: str  # "required", "optional", or "none": a base is an input like any other
    INPUTS: tuple[int, int | None]  # how many there must be, and may be, the base aside
    # The inputs come as x − base (as x where there is no base). An adapter's ΔW comes as it is.
    TASK_VECTORS: bool
    # Blocks hold whole rows along the last dimension; a vector is one row.
    ROWS: bool

    # Also, where there is something to be known of the whole tensor first:
    #     def prepare(task: Task, blocks: Blocks) -> Any
    #
    # Where whole rows are not enough, of how many elements a block must hold all or none:
    #     def together(shape: Shape) -> int
    #
    # And where some values of the parameters make no sense, what is wrong with them, if anything,
    # and what to write:
    #     def check(task: Task) -> Problem | None

    # What it does is either of these two; if both, `weights` may say None.
    #
    # The merged rows: a tensor of its own, or one of the block's.
    #     def block(task: Task, state: Any, block: Block) -> Tensor
    #
    # The merged rows are a sum of the inputs' and of the base's, by these factors: (of the base,
    # of each input).
    #     def weights(task: Task, state: Any) -> tuple[float, Sequence[float]] | None
    #
    # And where there is a compiled loop, the same rows rounded into `out`; None if it cannot.
    #     def compiled(task: Task, state: Any, block: Block, out: Flat) -> Proof | None
    #
    # Loops are all that it needs, of tensors that they read; if it does not say, where it has
    # no `block`:
    #     def without_torch(task: Task) -> bool


def names() -> list[str]:
    """Every method's name."""
    found = pkgutil.iter_modules(__path__)
    return sorted(info.name for info in found if not info.name.startswith("_"))


@cache
def method(name: str) -> Method:
    """The method called `name`, one of `names()`."""
    return cast("Method", importlib.import_module(f"{__name__}.{name}"))


def check(own: Method, task: Task) -> Problem | None:
    """What is wrong with the parameters of `task`, if anything; nothing is read for it."""
    ask = getattr(own, "check", None)
    return ask(task) if ask else None


def together(own: Method, shape: Shape) -> int:
    """Of how many elements that follow each other a block must hold all or none."""
    ask = getattr(own, "together", None)
    return ask(shape) if ask else 1


def prepare(own: Method, task: Task, blocks: Blocks) -> Any:
    """The method's statistics, if it has any."""
    ask = getattr(own, "prepare", None)
    return ask(task, blocks) if ask else None


def weights(own: Method, task: Task, state: Any) -> tuple[float, Sequence[float]] | None:
    """The factors of the base and of each input, if the method is a sum of them."""
    ask = getattr(own, "weights", None)
    return ask(task, state) if ask else None


def merged(own: Method, task: Task, state: Any, block: Block) -> Tensor:
    """The rows that the method makes of a block, which may be written over."""
    factors = weights(own, task, state)
    if factors is None:
        found: Tensor = own.block(task, state, block)  # type: ignore[attr-defined]
        return found
    share, others = factors
    if not block.inputs:
        assert block.base is not None
        return block.base if share == 1 else block.base * share
    total = block.inputs[0].mul_(others[0]) if others[0] != 1 else block.inputs[0]
    for each, factor in zip(block.inputs[1:], others[1:], strict=True):
        total.add_(each, alpha=factor)
    if block.base is not None and share:
        total.add_(block.base, alpha=share)
    return total


def without_torch(own: Method, task: Task) -> bool:
    """Whether compiled loops do all of it."""
    ask = getattr(own, "without_torch", None)
    found = bool(ask(task)) if ask else not hasattr(own, "block")
    return found and 1 <= task.count < native.MOST  # and the base


def compiled(own: Method, task: Task, state: Any, block: Block, out: Flat) -> Proof | None:
    """The merged rows, rounded into the flat `out` by compiled loops, and their proof.

    None if they must be made by others.
    """
    operands, base = block.operands(), block.base_operand()
    if not operands or not native.takes(out, base):
        return None
    factors = weights(own, task, state)
    if factors is not None:
        return native.combine(operands, factors[1], base, factors[0], out)
    ask = getattr(own, "compiled", None)
    return ask(task, state, block, out) if ask else None
