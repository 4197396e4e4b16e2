"""RandLoRA: `randlora_lambda`, `randlora_gamma`; `randlora_A` and `_B` for all, or drawn.

PEFT saves A and B for the whole model, and again with every module.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem
from weft.formats.adapters._peft_methods._forms import FLAG, INTEGER, NUMBER
from weft.formats.checkpoint import same_bytes

if TYPE_CHECKING:
    from weft.core.specs import Param
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "RANDLORA"
SUFFIXES = {f".randlora_{role}": role for role in ("lambda", "gamma", "A", "B")}
SHARED = {"base_model.randlora_A": "shared_A", "base_model.randlora_B": "shared_B"}
FIELDS = frozenset(
    {"projection_prng_key", "save_projection", "sparse", "very_sparse", "init_weights"}
    | {"randlora_dropout", "randlora_alpha"}
)
FORMS = {
    "randlora_alpha": NUMBER,
    "projection_prng_key": INTEGER,
    **dict.fromkeys(("save_projection", "sparse", "very_sparse"), FLAG),
}


def read(module: Module) -> list[AdapterEntry] | Problem:
    """The entry of one module; A and B in the file are taken, whatever `save_projection` says."""
    config = module.config
    there = {role for role in "AB" if role in module.tensors or f"shared_{role}" in module.shared}
    drawn = not there and not config["save_projection"]
    taken = {role: module.shared[f"shared_{role}"] for role in there - set(module.tensors)}
    whole = replace(module, tensors={**module.tensors, **taken})
    patterns = {"lambda": "r bases", "gamma": "bases short"}
    if not drawn:
        patterns |= {"A": "r 1 _", "B": "_ _ r"}
    sizes = whole.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    if wrong := rank_problem(module.name, module.file, sizes["r"], config):
        return wrong
    copies = {role: ref for role, ref in module.shared.items() if not drawn}
    for role, ref in copies.items():
        own = whole.tensors[role.removeprefix("shared_")]
        if own != ref and not same_bytes(own, ref):
            return Problem(f"{own.name!r} and {ref.name!r} in {ref.file} differ")
    params: tuple[tuple[str, Param], ...] = ()
    if drawn:
        # With both flags it is very sparse.
        sparsity = -1.0 if config["very_sparse"] else 3.0 if config["sparse"] else 0.0
        params = (("seed", config["projection_prng_key"]), ("sparsity", sparsity))
    tensors = (*whole.only(patterns), *copies.items())
    scaling = config["randlora_alpha"] / sizes["r"]
    return [AdapterEntry(module.name, "weight", "randlora", tensors, scaling, params)]
