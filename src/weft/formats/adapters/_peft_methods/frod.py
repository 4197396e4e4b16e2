"""FRoD: `frod_lambda_l`, `frod_lambda_s_values`; `base_model.frod_V.<category>` and so on for all.

The category is the role of a module in its layer, as PEFT reads it from the name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "FROD"
SUFFIXES = {".frod_lambda_l": "l", ".frod_lambda_s_values": "values"}
SHARED = {
    "base_model.frod_V.": "V.",
    "base_model.frod_s_indices.": "indices.",
    "base_model.frod_s_size.": "indices_size.",
}
MAY_BE_EMPTY = True  # a sparse part of nothing
FIELDS = frozenset(
    {"projection_prng_key", "save_projection", "frod_dropout", "init_weights", "sparse_rate"}
    | {"regularization_alpha", "progressbar", "runtime_offload_base_weight"}
)


def check(config: Mapping[str, Any]) -> Problem | None:
    if config.get("save_projection"):
        return None
    return Problem(
        "the file does not hold its projections (save_projection is false), which PEFT makes of "
        "the base by decompositions whose signs depend on the machine",
        "load it with PEFT where it was trained, and save it again with save_projection=True",
    )


def read(module: Module) -> list[AdapterEntry] | Problem:
    sizes = module.sizes(l="in", values="n")
    if isinstance(sizes, Problem):
        return sizes
    category = _category(module.name)
    roles = {role.rstrip("."): f"{role}{category}" for role in SHARED.values()}
    if absent := [key for key, role in SHARED.items() if f"{role}{category}" not in module.shared]:
        return Problem(f"{module.file} lacks {absent[0]}{category}, which {module.name!r} needs")
    shared = {role: module.shared[key] for role, key in roles.items()}
    inputs, count = sizes["in"], sizes["n"]
    wanted = {"V": (inputs, inputs), "indices": (2, count), "indices_size": (2,)}
    for role, ref in shared.items():
        if ref.shape != wanted[role]:
            return module.misfit(f"do not fit {ref.name} {list(ref.shape)}")
    tensors = (*module.only(("l", "values")), *shared.items())
    return [AdapterEntry(module.name, "weight", "frod", tensors)]


def _category(module: str) -> str:
    """`self_attn_q_proj` for `model.layers.3.self_attn.q_proj`."""
    *_, before, parent, name = ["", "", *module.split(".")]
    if not parent or parent.isdigit():
        return name
    if (before, parent, name) == ("attention", "output", "dense"):
        return "attention_output"
    return f"{parent}_{name}"
