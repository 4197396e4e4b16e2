"""UniLoRA: `unilora_theta_d` for all; `unilora_indices_A`, `_B`, `unilora_scales_A`, `_B`.

Without `save_indices` the vector is all there is. PEFT then shuffles its indices by a seed, and
hands them out to the modules in the order of the model's code, which no file tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem
from weft.formats.adapters._peft_methods._forms import FLAG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "UNILORA"
SUFFIXES = {f".unilora_{what}_{n}": f"{what}_{n}" for what in ("indices", "scales") for n in "AB"}
SHARED = {"base_model.unilora_theta_d": "theta"}
FIELDS = frozenset(
    {"theta_d_length", "proj_seed", "save_indices", "unilora_dropout", "init_theta_d_bound"}
    | {"init_weights"}
)
FORMS = {"save_indices": FLAG}


def check(config: Mapping[str, Any]) -> Problem | None:
    if config.get("save_indices"):
        return None
    return Problem(
        "the file does not say which values of its vector each module takes (save_indices is "
        "false): that depends on the order of the modules in the model's code",
        "load it with PEFT, and save it again with save_indices=True",
    )


def read(module: Module) -> list[AdapterEntry] | Problem:
    patterns = {"indices_A": "r in", "scales_A": "r in", "indices_B": "out r", "scales_B": "out r"}
    sizes = module.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    if (theta := module.shared.get("theta")) is None:
        return Problem(f"{module.file} has no {next(iter(SHARED))}, which all modules use")
    if len(theta.shape) != 1:
        return Problem(f"{theta.name} in {theta.file} is {list(theta.shape)}, and no vector")
    if wrong := rank_problem(module.name, module.file, sizes["r"], module.config):
        return wrong
    tensors = (*module.only(patterns), ("theta", theta))
    return [AdapterEntry(module.name, "weight", "unilora", tensors)]
