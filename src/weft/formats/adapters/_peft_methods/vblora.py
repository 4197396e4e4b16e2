"""VB-LoRA: `vblora_logits_A` and `_B`, or what `save_only_topk_weights` leaves; and the bank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import COUNT, FLAG, rank_problem
from weft.formats.adapters._peft_methods import lacks

if TYPE_CHECKING:
    from weft.core.specs import Shape, TensorRef
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "VBLORA"
SUFFIXES = {
    **{f".vblora_logits_{n}": f"logits_{n}" for n in "AB"},
    **{f".vblora_logits_{n}_topk_indices": f"indices_{n}" for n in "AB"},
    **{f".vblora_logits_{n}_topk_weights": f"weights_{n}" for n in "AB"},
}
SHARED = {"base_model.vblora_vector_bank": "bank"}
MAY_BE_EMPTY = ("_topk_weights",)  # one weight, which is 1
FIELDS = frozenset(
    {"num_vectors", "vector_length", "topk", "save_only_topk_weights", "vblora_dropout"}
    | {"init_vector_bank_bound", "init_logits_std"}
)
FORMS = {"topk": COUNT, "save_only_topk_weights": FLAG}


def read(module: Module) -> list[AdapterEntry] | Problem:
    if module.config.get("save_only_topk_weights"):
        roles = {f"vblora_logits_{n}_topk_{w}": f"{w}_{n}" for n in "AB" for w in _LEFT}
    else:
        roles = {f"vblora_logits_{n}": f"logits_{n}" for n in "AB"}
    if missing := lacks(module, **roles):
        return missing
    if "bank" not in module.shared:
        return Problem(f"{module.file} has no {next(iter(SHARED))}, which all modules use")
    topk = module.config.get("topk", 2)
    tensors = {role: module.tensors[role] for role in roles.values()}
    A = tensors.get("logits_A") or tensors["indices_A"]
    wrong = _shapes(module, tensors, topk) or rank_problem(module.name, A, module.config)
    if wrong:
        return wrong
    tensors["bank"] = module.shared["bank"]
    params = (("topk", topk),)
    return [AdapterEntry(module.name, "weight", "vblora", tuple(tensors.items()), params=params)]


_LEFT = ("indices", "weights")


def _shapes(module: Module, tensors: dict[str, TensorRef], topk: int) -> Problem | None:
    bank = module.shared["bank"]
    if _fit({role: ref.shape for role, ref in tensors.items()}, bank.shape, topk):
        return None
    said = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in tensors.values())
    return Problem(
        f"module {module.name!r} in {module.file}: {said} do not go together with a bank of "
        f"{list(bank.shape)} and topk = {topk}"
    )


def _fit(shapes: dict[str, Shape], bank: Shape, topk: int) -> bool:
    """A and B of one rank, and every last axis as long as what it stands for."""
    if len(bank) != 2 or topk > bank[0] or any(len(shape) != 3 for shape in shapes.values()):
        return False
    last = {"logits": bank[0], "indices": topk, "weights": topk - 1}
    pieces: dict[str, set[tuple[int, int]]] = {"A": set(), "B": set()}
    for role, (first, second, count) in shapes.items():
        what, _, factor = role.partition("_")
        pieces[factor].add((first, second))
        if count != last[what]:
            return False
    (A, *more_A), (B, *more_B) = pieces["A"], pieces["B"]
    return A[0] == B[1] and not more_A and not more_B
