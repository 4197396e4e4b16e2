"""Integers in a file that say where something belongs: read exactly, and none that leads astray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import Delta
    from weft.deltas import Source


def load(delta: Delta, source: Source, role: str, *limits: int) -> Tensor:
    """The integers of `role`, from 0 to below their limit: one for all, or one for each row.

    Raises:
        FormatError: Some of them are not.
    """
    indices = source.whole(role).long()
    limit = indices.new_tensor(limits).view(-1, *[1] * (indices.dim() - 1))
    if ((indices < 0) | (indices >= limit)).any():
        ref = dict(delta.tensors)[role]
        raise FormatError(
            f"{ref.name} in {ref.file} holds indices outside of {' × '.join(map(str, limits))}",
            "the file is damaged, or the base is another one than the adapter's",
        )
    return indices
