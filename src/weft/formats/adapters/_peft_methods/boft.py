"""BOFT: `boft_R` and `boft_s`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import CONFIG

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "BOFT"
SUFFIXES = {".boft_R": "R", ".boft_s": "s"}
FIELDS = frozenset(
    {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"}
    | {"init_weights"}
)


def read(module: Module) -> list[AdapterEntry] | Problem:
    sizes = module.sizes(R="factors blocks size size", s="_ _")
    if isinstance(sizes, Problem):
        return sizes
    if 1 not in module.tensors["s"].shape:
        return module.misfit("do not have one factor per output")
    # An axis of 1 in front is that of a convolution; `exclude_modules` came with PEFT 0.14.
    if module.tensors["s"].shape[0] == 1 and "exclude_modules" not in module.config:
        return Problem(
            f"module {module.name!r}: PEFT before 0.14, which wrote no exclude_modules into "
            f"{CONFIG}, rotates other axes of a convolution than later ones",
            "merge it with PEFT 0.13's merge_and_unload",
        )
    return [AdapterEntry(module.name, "weight", "boft", module.only(("R", "s")))]
