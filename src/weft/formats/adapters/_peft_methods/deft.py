"""DEFT: `deft_P` and `deft_R`; PaRa (`para`): `deft_P` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods._forms import FLAG, NUMBER, choice, or_none

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "DEFT"
SUFFIXES = {".deft_P": "P", ".deft_R": "R"}
FIELDS = frozenset(
    {"decomposition_method", "init_scale", "alpha", "para", "deft_dropout", "init_weights"}
)
FORMS = {
    "decomposition_method": choice("relu", "qr"),
    "alpha": or_none(NUMBER),
    "para": FLAG,
}


def read(module: Module) -> list[AdapterEntry] | Problem:
    config = module.config
    patterns = {"P": "out r"} if config["para"] else {"P": "out r", "R": "r in"}
    sizes = module.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    if sizes["r"] != min(config.get("r", 8), sizes["out"]):
        return module.misfit(f"are not of the rank {config.get('r')} that the config says")
    # The rank that counts is the one left where there are fewer outputs.
    scaling = config["alpha"] / sizes["r"] if config["alpha"] else 1.0
    params = (("method", config["decomposition_method"]),)
    return [AdapterEntry(module.name, "weight", "deft", module.only(patterns), scaling, params)]
