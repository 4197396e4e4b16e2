"""`torch`, loaded when something first asks it for anything.

That takes a second. A plan asks for shapes alone, and what compiled loops do needs no torch.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            if not torch_is_loaded():
                load_torch()
            import torch

            return getattr(torch, name)

    torch = _Torch()


# Set where the whole process is one command of weft.
alone = False


def load_torch() -> None:
    """Ask it for something, to have it from now on.

    Importing it makes a million objects that live until the end. Looking through them again and
    again finds nothing, and takes a tenth of the import: in a process of our own nobody does.
    """
    if torch_is_loaded() or not alone:
        import torch

        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def torch_is_loaded() -> bool:
    """Whether it was asked for anything yet, here or elsewhere."""
    return "torch" in sys.modules
