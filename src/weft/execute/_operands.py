"""Some rows of what a method sees, as they are stored where compiled loops read that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft import methods, native
from weft.core.specs import AddDeltas, Expression, Load, Merge
from weft.execute._task_vectors import task_vector
from weft.execute._updates import in_one_pass
from weft.methods import Block, Stored
from weft.native import Operand

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import TensorRef
    from weft.execute._expressions import Evaluator
    from weft.execute._task_vectors import Loaded
    from weft.native import Numbers


class Reader:
    """Rows `start` to `stop` of the tensors of one job; each is read once."""

    def __init__(self, evaluator: Evaluator, start: int, stop: int) -> None:
        self.evaluator = evaluator
        self.start = start
        self.stop = stop
        self._read: dict[TensorRef, Numbers] = {}
        self._loaded: Loaded = {}

    def block(self, expression: Merge, path: str, into: Tensor | None = None) -> Block:
        """The rows that a method sees; those of the first input in `into`, if given."""
        base: Tensor | Stored | None = None
        if expression.base:
            base = self.operand(expression.base, f"{path}base", f"{path}b")
        inputs: list[Tensor | Stored] = []
        block = Block(self.start * self.evaluator.columns, base, inputs)
        apart = methods.method(expression.method).TASK_VECTORS
        for number, each in enumerate(expression.inputs):
            names = f"{path}{number}", f"{path}{number}."
            out = into if number == 0 else None
            if apart and expression.base:
                pair = each, expression.base
                inputs.append(self._task_vector(*pair, block, *names, out))
            else:
                inputs.append(self.operand(each, *names, out))
        return block

    def operand(
        self, expression: Expression, name: str, path: str, out: Tensor | None = None
    ) -> Tensor | Stored:
        """Rows of any expression, those that must be widened in `out` or the buffer `name`."""
        found = self._as_stored(expression, name, out)
        if found is not None:
            return found
        values = self._buffer(name, out)
        self._widen_weight(expression, f"{name} weight")
        evaluator, loaded = self.evaluator, self._loaded
        evaluator.evaluate(expression, self.start, self.stop, values, path, loaded)
        return values

    def _task_vector(
        self,
        tuned: Expression,
        base: Expression,
        block: Block,
        name: str,
        path: str,
        out: Tensor | None,
    ) -> Tensor | Stored:
        """Rows of tuned − base, which are those of `block`."""
        if tuned == base:
            return self._buffer(name, out).zero_()
        stored = (
            block.base_operand() if isinstance(base, Load) and self._compiled(base.ref) else None
        )
        if stored is not None:
            found = self._as_stored(tuned, name, out, (base, stored))
            if found is not None:
                return found
        rows = block.base
        assert rows is not None
        if isinstance(base, Load):
            self._loaded[base.ref] = rows
        self._widen_weight(tuned, f"{name} weight")
        values, span = self._buffer(name, out), (self.start, self.stop)
        task_vector(self.evaluator, tuned, base, rows, *span, values, path, self._loaded)
        return values

    def _widen_weight(self, expression: Expression, name: str) -> None:
        """What deltas are added to, if it was read as it is stored: it is not read again."""
        weight = expression.base if isinstance(expression, AddDeltas) else None
        if isinstance(weight, Load) and weight.ref in self._read:
            ref, rows = weight.ref, self._buffer(name, None)
            if ref not in self._loaded:
                native.widen(Operand(self._read[ref]), rows)
                self._loaded[ref] = rows

    def _as_stored(
        self,
        expression: Expression,
        name: str,
        out: Tensor | None,
        less: tuple[Expression, Operand] | None = None,
    ) -> Stored | None:
        """Rows of a tensor, perhaps with an update that W has no part in.

        Less those of another tensor. None if that is not to be had.
        """
        updated = expression if in_one_pass(expression) else None
        weight = updated.base if updated else expression
        if not isinstance(weight, Load) or not self._compiled(weight.ref):
            return None
        if updated is not None and less is not None and weight == less[0]:
            alone = self.update(updated, name, out)  # ΔW is all of the task vector
            return Stored(Operand(alone.view(-1)), lambda: alone)
        operand = Operand(
            self._rows(weight.ref, name),
            None if less is None else less[1].values,
            None if updated is None else self.update(updated, f"{name} update").view(-1),
        )

        def widen() -> Tensor:
            values = self._buffer(name, out)
            native.widen(operand, values)
            return values

        return Stored(operand, widen)

    def _compiled(self, ref: TensorRef) -> bool:
        """Whether compiled loops read the tensor."""
        return self.evaluator.compiles and native.reads(ref.dtype)

    def _rows(self, ref: TensorRef, name: str) -> Tensor | Numbers:
        """Flat, as they are stored or widened already; several models may stand on them."""
        if ref in self._loaded:
            return self._loaded[ref].view(-1)
        if ref not in self._read:
            files, columns = self.evaluator.files, self.evaluator.columns
            span, held = (self.start, self.stop), self.evaluator.held
            rows = held.rows(files, ref, *span, columns) if held else None
            if rows is None:
                rows = self.evaluator.workspace.read(files, ref, *span, columns, f"in {name}")
            self._read[ref] = rows
        return self._read[ref]

    def update(self, expression: AddDeltas, name: str, out: Tensor | None = None) -> Tensor:
        """ΣwᵢΔWᵢ of deltas that need no W (`in_one_pass`)."""
        found = self._buffer(name, out)
        first, *rest = expression.deltas
        kind, state = self.evaluator.state(first)
        kind.block(state, found, self.start, found)
        if first.weight != 1:
            found.mul_(first.weight)
        for each in rest:
            kind, state = self.evaluator.state(each)
            kind.add(state, each.weight, self.start, found)  # type: ignore[attr-defined]
        return found

    def _buffer(self, name: str, out: Tensor | None) -> Tensor:
        return self.evaluator.buffer(name, self.stop - self.start) if out is None else out
