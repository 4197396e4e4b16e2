"""OSF: `osf_svd_params.U_low`, `.S_low`, `.V_low`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "OSF"
SUFFIXES = {f".osf_svd_params.{role}_low": role for role in "USV"}
FIELDS = frozenset({"effective_rank", "target_svd_config", "init_weights"})


def read(module: Module) -> list[AdapterEntry] | Problem:
    sizes = module.sizes(U="out k", S="k", V="k in")
    if isinstance(sizes, Problem):
        return sizes
    return [AdapterEntry(module.name, "weight", "osf", module.only("USV"))]
