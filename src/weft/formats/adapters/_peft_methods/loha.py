"""LoHa: `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`, and `hada_t1`, `hada_t2` (conv)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem, scaling_of
from weft.formats.adapters._peft_methods._forms import NUMBER, one_of

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "LOHA"
SUFFIXES = {f".hada_{role}": role for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
FIELDS = frozenset(
    {"r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout"}
    | {"use_effective_conv2d", "init_weights"}
)
FORMS = {"alpha": NUMBER, "init_weights": one_of()}


def read(module: Module) -> list[AdapterEntry] | Problem:
    if "t1" in module.tensors or "t2" in module.tensors:
        patterns = {"w1_a": "r out", "w1_b": "r in", "t1": "r r ..."}
        patterns |= {"w2_a": "r out", "w2_b": "r in", "t2": "r r ..."}
    else:
        patterns = {"w1_a": "out r", "w1_b": "r in", "w2_a": "out r", "w2_b": "r in"}
    sizes = module.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    if wrong := rank_problem(module.name, module.file, sizes["r"], module.config):
        return wrong
    scaling = scaling_of(module.name, sizes["r"], module.config, "alpha")
    if isinstance(scaling, Problem):
        return scaling
    return [AdapterEntry(module.name, "weight", "loha", module.only(patterns), scaling)]
