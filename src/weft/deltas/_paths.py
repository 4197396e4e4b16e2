"""GLoRA's forms of a matrix or a vector: a product, a column, one number, or all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Shape
    from weft.deltas import Source


def fits(shapes: Mapping[str, Shape], name: str, shape: Shape) -> bool:
    """Whether what `name` stands for can be added to a tensor of `shape`."""
    if f"{name}_left" in shapes:
        left, right = shapes[f"{name}_left"], shapes[f"{name}_right"]
        return (left[0], right[1]) == shape
    column = (*shape[:1], *(1 for _ in shape[1:]))
    return shapes[name] in (shape, column, (1,))


@dataclass(frozen=True, slots=True)
class Path:
    """One of them: `left` @ `right`, or `right` alone; or not loaded, since it is as large as W."""

    name: str
    source: Source
    left: Tensor | None
    right: Tensor | None

    def rows(self, start: int, like: Tensor) -> Tensor:
        """As many rows as `like` has, which is a block of W, from `start` on."""
        stop = start + like.shape[0]
        if self.left is not None and self.right is not None:
            return self.left[start:stop] @ self.right
        if self.right is not None:
            return self.right if self.right.numel() == 1 else self.right[start:stop]
        out = like.new_empty(like.shape)
        self.source.rows(self.name, start, stop, out)
        return out


def load(delta: Delta, source: Source, name: str) -> Path:
    shapes = {role: ref.shape for role, ref in delta.tensors}
    if f"{name}_left" in shapes:
        left, right = source.whole(f"{name}_left"), source.whole(f"{name}_right")
        return Path(name, source, left, right)
    if len(shapes[name]) == 2 and shapes[name][1] > 1:
        return Path(name, source, None, None)
    return Path(name, source, None, source.whole(name).view(-1, 1))
