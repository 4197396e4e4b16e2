"""LoHa: `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`, and `hada_t1`, `hada_t2` (conv)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import scaling_of

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "LOHA"
SUFFIXES = {f".hada_{role}": role for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
FIELDS = frozenset(
    {"r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout"}
    | {"use_effective_conv2d", "init_weights"}
)


def read(module: Module) -> list[AdapterEntry] | Problem:
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    if missing := [name for name in names if name not in module.tensors]:
        return Problem(f"module {module.name!r} in {module.file} lacks hada_{missing[0]}")
    rank = module.tensors["w1_b"].shape[0]
    scaling = scaling_of(module.name, rank, {**module.config, "lora_alpha": module.config["alpha"]})
    if isinstance(scaling, Problem):
        return scaling
    return [AdapterEntry(module.name, "weight", "loha", tuple(module.tensors.items()), scaling)]
