"""What compiled loops do alone, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft import native
from weft.core.specs import Expression, Load, Merge, children, leaves
from weft.methods import method

if TYPE_CHECKING:
    from typing import TypeGuard


def compiled(device: str) -> bool:
    """Whether there are any, and they see the device's memory."""
    return device == "cpu" and native.library() is not None


def reads(expression: Expression) -> TypeGuard[Merge]:
    """A merge of tensors that all lie in files, in dtypes that the loops widen as they go."""
    if not isinstance(expression, Merge):
        return False
    # Of a base that is an input, too, a task vector of zeros is made.
    zeros = expression.base in expression.inputs and method(expression.method).TASK_VECTORS
    return (
        not zeros
        and all(isinstance(each, Load) for each in children(expression))
        and all(native.reads(ref.dtype) for ref in leaves(expression))
    )
