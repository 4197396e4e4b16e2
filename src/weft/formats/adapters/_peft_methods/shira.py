"""SHiRA: `shira_weight`, the values, and `shira_indices`, their rows and columns.

The indices are saved whatever drew them. On Windows PEFT saves them in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "SHIRA"
SUFFIXES = {".shira_weight": "values", ".shira_indices": "indices"}
FIELDS = frozenset({"mask_type", "random_seed", "init_weights"})


def read(module: Module) -> list[AdapterEntry] | Problem:
    sizes = module.sizes(values="n", indices="2 n")
    if isinstance(sizes, Problem):
        return sizes
    tensors = module.only(("values", "indices"))
    return [AdapterEntry(module.name, "weight", "sparse", tensors)]
