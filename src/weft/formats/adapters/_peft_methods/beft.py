"""BEFT: `beft_bias`, added to a bias that the module must have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods._forms import one_of

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "BEFT"
SUFFIXES = {".beft_bias": "bias"}
FIELDS = frozenset({"init_weights"})
FORMS = {"init_weights": one_of()}


def read(module: Module) -> list[AdapterEntry] | Problem:
    sizes = module.sizes(bias="1 _")
    if isinstance(sizes, Problem):
        return sizes
    return [AdapterEntry(module.name, "bias", "beft", module.only(["bias"]))]
