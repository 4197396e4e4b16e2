"""GraLoRA: `gralora_A`, `gralora_B`, and of a hybrid `gralora_A_general`, `gralora_B_general`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods._forms import COUNT, NUMBER, one_of

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "GRALORA"
SUFFIXES = {
    ".gralora_A": "A_blocks",
    ".gralora_B": "B_blocks",
    ".gralora_A_general.weight": "A",
    ".gralora_B_general.weight": "B",
}
FIELDS = frozenset({"alpha", "hybrid_r", "gralora_k", "gralora_dropout", "init_weights"})
FORMS = {
    "alpha": NUMBER,
    "r": COUNT,
    "hybrid_r": COUNT,
    "gralora_k": COUNT,
    "init_weights": one_of(),
}


def read(module: Module) -> list[AdapterEntry] | Problem:
    patterns = {"A_blocks": "gralora_k _ r", "B_blocks": "gralora_k r _"}
    if module.config["hybrid_r"]:
        patterns |= {"A": "hybrid_r _", "B": "_ hybrid_r"}
    sizes = module.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    for field, size in sizes.items():
        if size != module.config[field]:
            return module.misfit(f"have {field} = {size}, and it is {module.config[field]}")
    if sizes["r"] % sizes["gralora_k"]:
        return module.misfit(f"cannot share a rank of {sizes['r']} among {sizes['gralora_k']}")
    scaling = module.config["alpha"] / (sizes["r"] + module.config["hybrid_r"])
    return [AdapterEntry(module.name, "weight", "gralora", module.only(patterns), scaling)]
