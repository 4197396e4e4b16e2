"""SHiRA: `shira_weight`, the values, and `shira_indices`, their rows and columns.

The indices are saved whatever drew them. On Windows PEFT saves them in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods import lacks

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "SHIRA"
SUFFIXES = {".shira_weight": "values", ".shira_indices": "indices"}
FIELDS = frozenset({"mask_type", "random_seed", "init_weights"})


def read(module: Module) -> list[AdapterEntry] | Problem:
    if missing := lacks(module, shira_weight="values", shira_indices="indices"):
        return missing
    values, indices = module.tensors["values"], module.tensors["indices"]
    if len(values.shape) != 1 or indices.shape != (2, *values.shape):
        return Problem(
            f"module {module.name!r} in {module.file}: shira_weight {list(values.shape)} and "
            f"shira_indices {list(indices.shape)} are not values with a row and a column each"
        )
    return [AdapterEntry(module.name, "weight", "sparse", tuple(module.tensors.items()))]
