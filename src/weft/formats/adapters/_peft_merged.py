"""LoRA on parts of a fused matrix, as PEFT 0.1 and 0.2 saved it (`enable_lora`).

They did so unasked wherever `target_modules` had one name: queries and values of three parts.
Their own merge of it fails (0.1 and 0.2), and PEFT from 0.3 on does not know it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry, TensorRef
from weft.formats.adapters._peft_config import CONFIG, rank_problem, scaling_of

if TYPE_CHECKING:
    from collections.abc import Mapping


def entry(
    module: str, roles: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> AdapterEntry | Problem:
    """A (m · r, in) and B (rows, m · r / g[, 1]), for m parts that are changed."""
    parts = tuple(int(part) for part in config["enable_lora"])
    file = next(iter(roles.values())).file
    shapes = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in roles.values())
    where = f"module {module!r} in {file}"
    if set(roles) != {"A", "B"} or not any(parts):
        return Problem(
            f"{where} has {shapes}, and {CONFIG} says enable_lora = {config['enable_lora']}: that "
            "is a lora_A and a lora_B, of one part at least",
            "the config and the weights are not of one save",
        )
    A, B = roles["A"], roles["B"]
    if not _fit(A.shape, B.shape, sum(parts)):
        return Problem(
            f"{where}: {shapes} are not the factors of {sum(parts)} parts that {CONFIG} says "
            "(enable_lora)",
            "the config and the weights are not of one save",
        )
    rank = A.shape[0] // sum(parts)
    if problem := rank_problem(module, file, rank, config):
        return problem
    scaling = scaling_of(module, rank, config)
    if isinstance(scaling, Problem):
        return scaling
    tensors = (("A", A), ("B", B))
    return AdapterEntry(module, "weight", "merged_lora", tensors, scaling, (("parts", parts),))


def _fit(A: tuple[int, ...], B: tuple[int, ...], parts: int) -> bool:
    if len(A) != 2 or len(B) not in (2, 3) or B[2:] not in ((), (1,)):
        return False
    if A[0] % parts or B[0] % parts or A[0] % B[1]:
        return False
    groups = A[0] // B[1]
    return B[0] % groups == 0
