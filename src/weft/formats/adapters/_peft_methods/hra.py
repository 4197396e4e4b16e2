"""HRA: `hra_u`, (in, r)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem
from weft.formats.adapters._peft_methods._forms import FLAG, one_of

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "HRA"
SUFFIXES = {".hra_u": "u"}
FIELDS = frozenset({"apply_GS", "init_weights"})
FORMS = {"apply_GS": FLAG, "init_weights": one_of()}


def read(module: Module) -> list[AdapterEntry] | Problem:
    sizes = module.sizes(u="_ r")
    if isinstance(sizes, Problem):
        return sizes
    if wrong := rank_problem(module.name, module.file, sizes["r"], module.config):
        return wrong
    params = (("orthogonal", bool(module.config.get("apply_GS"))),)
    return [AdapterEntry(module.name, "weight", "hra", module.only("u"), params=params)]
