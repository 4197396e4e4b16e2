"""`torch`, loaded when a kind first computes.

A plan asks the kinds about shapes alone, and loading torch takes a second: by then the executor
can have copied what does not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()
