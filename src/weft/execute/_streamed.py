"""A matrix that is not held: it is read again, block by block, for every product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from weft.decompose._rough import Rough


class Blocks(Protocol):
    """What is read by blocks of rows, as `Difference` is."""

    @property
    def columns(self) -> int:
        """Of each row."""

    def blocks(
        self, start: int, stop: int, into: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(first row, values, what else there is) of rows `start` to `stop`."""


@dataclass(frozen=True)
class Streamed:
    """A matrix that is too large: every product reads it again.

    Attributes:
        source: Of which it is rows `start` to `stop`.
        energy: ‖A‖².
    """

    source: Blocks
    start: int
    stop: int
    energy: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.source.columns

    def matmul(self, X: Tensor) -> Tensor:
        out = torch.empty(self.shape[0], X.shape[1], dtype=X.dtype)
        for first, block, _ in self.source.blocks(self.start, self.stop):
            at = first - self.start
            right = X.to(block.device, block.dtype)
            out[at : at + len(block)].copy_(block @ right)
        return out

    def rmatmul(self, Y: Tensor) -> Tensor:
        out: Tensor | None = None
        for first, block, _ in self.source.blocks(self.start, self.stop):
            at = first - self.start
            rows = Y[at : at + len(block)].to(block.device, block.dtype)
            out = block.T @ rows if out is None else out.addmm_(block.T, rows)
        assert out is not None
        return out.cpu().to(Y.dtype)

    def rough(self) -> Rough | None:
        return None

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        for first, block, _ in self.source.blocks(self.start, self.stop):
            yield first - self.start, block.cpu()
