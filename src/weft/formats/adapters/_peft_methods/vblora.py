"""VB-LoRA: `vblora_logits_A` and `_B`, or what `save_only_topk_weights` leaves; and the bank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem
from weft.formats.adapters._peft_methods._forms import FLAG, POSITIVE

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "VBLORA"
SUFFIXES = {
    **{f".vblora_logits_{n}": f"logits_{n}" for n in "AB"},
    **{f".vblora_logits_{n}_topk_indices": f"indices_{n}" for n in "AB"},
    **{f".vblora_logits_{n}_topk_weights": f"weights_{n}" for n in "AB"},
}
SHARED = {"base_model.vblora_vector_bank": "bank"}
MAY_BE_EMPTY = True  # the weights of one vector, which is all that is left to say
FIELDS = frozenset(
    {"num_vectors", "vector_length", "topk", "save_only_topk_weights", "vblora_dropout"}
    | {"init_vector_bank_bound", "init_logits_std"}
)
FORMS = {"topk": POSITIVE, "save_only_topk_weights": FLAG}


def read(module: Module) -> list[AdapterEntry] | Problem:
    topk = module.config["topk"]
    if module.config["save_only_topk_weights"]:
        patterns = {"indices_A": f"r in {topk}", "weights_A": f"r in {topk - 1}"}
        patterns |= {"indices_B": f"out r {topk}", "weights_B": f"out r {topk - 1}"}
    else:
        patterns = {"logits_A": "r in vectors", "logits_B": "out r vectors"}
    sizes = module.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    if (bank := module.shared.get("bank")) is None:
        return Problem(f"{module.file} has no {next(iter(SHARED))}, which all modules use")
    count = bank.shape[0] if len(bank.shape) == 2 else 0
    if count != sizes.get("vectors", count) or topk > count:
        return module.misfit(f"do not fit {bank.name} {list(bank.shape)} and topk = {topk}")
    first = module.tensors[next(iter(patterns))]
    if wrong := rank_problem(module.name, module.file, first.shape[0], module.config):
        return wrong
    tensors = (*module.only(patterns), ("bank", bank))
    return [AdapterEntry(module.name, "weight", "vblora", tensors, params=(("topk", topk),))]
