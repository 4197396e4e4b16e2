"""Numbers in host memory that no library need be loaded to hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Numbers:
    """As much of a flat tensor of torch as the compiled loops ask for; `tensor` is the rest.

    Attributes:
        view: Their bytes, which live as long as this.
        address: Where they begin.
        dtype: Its name, as torch spells it.
        size: Bytes of each.
    """

    __slots__ = ("address", "dtype", "size", "view")
    is_cpu = True

    def __init__(self, view: memoryview, address: int, dtype: str, size: int) -> None:
        self.view = view
        self.address = address
        self.dtype = dtype
        self.size = size

    def numel(self) -> int:
        return len(self.view) // self.size

    def data_ptr(self) -> int:
        return self.address

    def is_contiguous(self) -> bool:
        return True

    def __getitem__(self, here: slice) -> Numbers:
        """Some that follow each other."""
        first, last, _ = here.indices(self.numel())
        begin = first * self.size
        view = self.view[begin : max(last, first) * self.size]
        return Numbers(view, self.address + begin, self.dtype, self.size)

    def tensor(self) -> Tensor:
        """The same memory as a flat tensor."""
        import torch

        dtype = getattr(torch, self.dtype)
        # torch has no tensor on an empty buffer.
        return (
            torch.frombuffer(self.view, dtype=dtype)
            if len(self.view)
            else torch.empty(0, dtype=dtype)
        )
