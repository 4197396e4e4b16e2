"""AdaLoRA: `lora_A`, `lora_B`, `lora_E`, cut to the ranks that `rank_pattern` keeps.

The scaling is alpha over the rank that training began with (`init_r`). Where alpha is 0 or less it
is that rank itself; PEFT takes the rank that is left when it loads such an adapter again, which is
not what it trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import CONFIG, VARIANTS
from weft.formats.adapters._peft_methods._forms import COUNT, NUMBER
from weft.formats.adapters._peft_methods._tokens import token_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "ADALORA"
SUFFIXES = {
    ".lora_A": "A",
    ".lora_B": "B",
    ".lora_E": "E",
    ".token_adapter.trainable_tokens_delta": "rows",
}
FIELDS = frozenset(
    {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
    | {"total_step"}
)
MAY_BE_EMPTY = True


def _is_masks(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(mask, list) for mask in value.values())
        and all(isinstance(kept, bool) for mask in value.values() for kept in mask)
    )


FORMS = {
    "init_r": COUNT,
    "lora_alpha": NUMBER,
    "rank_pattern": (_is_masks, "a mapping of names to lists of true and false"),
}


def check(config: Mapping[str, Any]) -> Problem | None:
    for field, what in VARIANTS.items():
        if config.get(field):
            return Problem(f"AdaLoRA does not know {what}", f"remove {field} from {CONFIG}")
    return None


def read(module: Module) -> list[AdapterEntry] | Problem:
    tokens = module.tensors.get("rows")
    if tokens is None:
        return _factors(module)
    rows = token_rows(module.name, tokens, module.config, "trainable_token_indices")
    return rows if isinstance(rows, Problem) else [rows]


def _factors(module: Module) -> list[AdapterEntry] | Problem:
    roles = {"A": "r _", "B": "_ r", "E": "r 1"}
    sizes = module.sizes(**roles)
    if isinstance(sizes, Problem):
        return sizes
    began = module.config["init_r"]
    mask = (module.config.get("rank_pattern") or {}).get(f"{module.name}.lora_E", [True] * began)
    if sizes["r"] != sum(mask):
        return Problem(
            f"module {module.name!r} in {module.file} has rank {sizes['r']}, and {CONFIG} says "
            f"{sum(mask)}",
            "the config and the weights are not of one save",
        )
    alpha = module.config["lora_alpha"]
    scaling = float(alpha if alpha > 0 else began)
    return [
        AdapterEntry(
            module.name, "weight", "adalora", module.only(roles), scaling, (("rank", began),)
        )
    ]
