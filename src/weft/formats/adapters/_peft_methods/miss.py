"""MiSS: `miss_block`, (r, out), of mini (r, mini_r), of Bat (out / r, r, r).

Which one it is, PEFT calls a way to initialise: `init_weights`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem
from weft.formats.adapters._peft_methods._forms import one_of

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "MISS"
SUFFIXES = {".miss_block": "block"}
FIELDS = frozenset({"miss_dropout", "mini_r", "init_weights"})
FORMS = {"init_weights": one_of("bat", "mini")}


def read(module: Module) -> list[AdapterEntry] | Problem:
    mode = module.config.get("init_weights")
    sizes = module.sizes(block="_ r r" if mode == "bat" else "r m")
    if isinstance(sizes, Problem):
        return module.misfit(f"is not what it should be: init_weights is {mode!r}")
    if wrong := rank_problem(module.name, module.file, sizes["r"], module.config):
        return wrong
    if mode == "mini" and sizes["m"] != module.config.get("mini_r"):
        return module.misfit(f"is not what it should be: mini_r is {module.config.get('mini_r')}")
    params = (("repeats", mode == "mini"), ("square", sizes["r"] if mode == "bat" else 1))
    return [AdapterEntry(module.name, "weight", "miss", module.only(["block"]), params=params)]
