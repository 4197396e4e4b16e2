"""C3A: `c3a_kernel`, (out / block, in / block, block)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods._forms import one_of

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "C3A"
SUFFIXES = {".c3a_kernel": "kernel"}
FIELDS = frozenset({"block_size", "block_size_pattern", "init_weights"})
FORMS = {"init_weights": one_of("gaussian", "kaiming_uniform", "xavier_uniform")}


def read(module: Module) -> list[AdapterEntry] | Problem:
    sizes = module.sizes(kernel="_ _ _")
    if isinstance(sizes, Problem):
        return sizes
    return [AdapterEntry(module.name, "weight", "c3a", module.only(["kernel"]))]
