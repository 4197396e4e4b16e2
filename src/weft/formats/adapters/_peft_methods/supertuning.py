"""Super-Tuning: `supertuning_values` at `supertuning_indices`; with `r` (Supra) LoRA beside them.

The indices can be left out, and PEFT finds them again: the weights of largest magnitude. But which
of two equal ones comes first is not defined, and in 16 bits there are many: then nothing is merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem, scaling_of
from weft.formats.adapters._peft_methods._forms import FLAG, NUMBER, POSITIVE, or_none

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "SUPERTUNING"
SUFFIXES = {
    ".supertuning_values": "values",
    ".supertuning_indices": "indices",
    ".supertuning_lora_A.weight": "A",
    ".supertuning_lora_B.weight": "B",
}
FIELDS = frozenset({"sparsity", "select_top", "init_weights", "save_precomputed_indices"})
FORMS = {
    "r": or_none(POSITIVE),
    "lora_alpha": or_none(NUMBER),
    "save_precomputed_indices": FLAG,
}


def check(config: Mapping[str, Any]) -> Problem | None:
    if config.get("save_precomputed_indices"):
        return None
    return Problem(
        "the file does not say which weights were trained (save_precomputed_indices is false), and "
        "their order by magnitude is not defined where two are equal",
        "load it with PEFT, and save it again with save_precomputed_indices=True",
    )


def read(module: Module) -> list[AdapterEntry] | Problem:
    patterns = {"values": "n", "indices": "n"}
    hybrid = module.config["r"] is not None
    sizes = module.sizes(**patterns, **({"A": "r _", "B": "_ r"} if hybrid else {}))
    if isinstance(sizes, Problem):
        return sizes
    sparse = AdapterEntry(module.name, "weight", "sparse", module.only(patterns))
    if not hybrid:
        return [sparse]
    scaling = scaling_of(module.name, sizes["r"], module.config)
    wrong = rank_problem(module.name, module.file, module.tensors["A"].shape[0], module.config)
    if wrong or isinstance(scaling, Problem):
        return wrong or scaling  # type: ignore[return-value]
    return [sparse, AdapterEntry(module.name, "weight", "lora", module.only("AB"), scaling)]
