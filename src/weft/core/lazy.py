"""`torch`, loaded when something first asks it for anything.

That takes a second. A plan asks for shapes alone, and what compiled loops do needs no torch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()


def load_torch() -> None:
    """Ask it for something, to have it from now on."""
    import torch  # noqa: F401


def torch_is_loaded() -> bool:
    """Whether it was asked for anything yet, here or elsewhere."""
    return "torch" in sys.modules
