"""DeLoRA: `delora_A`, `delora_B`, `delora_lambda`, `delora_w_norm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem
from weft.formats.adapters._peft_methods._forms import one_of

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "DELORA"
SUFFIXES = {
    ".delora_A": "A",
    ".delora_B": "B",
    ".delora_lambda": "lambda",
    ".delora_w_norm": "norm",
}
FIELDS = frozenset({"delora_lambda", "lambda_pattern", "module_dropout", "init_weights"})
FORMS = {"init_weights": one_of()}


def read(module: Module) -> list[AdapterEntry] | Problem:
    patterns = {"A": "r in", "B": "_ r", "lambda": "1", "norm": "in"}
    sizes = module.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    if wrong := rank_problem(module.name, module.file, sizes["r"], module.config):
        return wrong
    return [AdapterEntry(module.name, "weight", "delora", module.only(patterns))]
