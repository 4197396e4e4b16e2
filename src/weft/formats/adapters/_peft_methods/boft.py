"""BOFT: `boft_R` and `boft_s`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods import lacks

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "BOFT"
SUFFIXES = {".boft_R": "R", ".boft_s": "s"}
FIELDS = frozenset(
    {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"}
    | {"init_weights"}
)


def read(module: Module) -> list[AdapterEntry] | Problem:
    if missing := lacks(module, boft_R="R", boft_s="s"):
        return missing
    R, s = module.tensors["R"], module.tensors["s"]
    if len(R.shape) != 4 or R.shape[2] != R.shape[3] or len(s.shape) != 2 or min(s.shape) != 1:
        return Problem(
            f"module {module.name!r} in {module.file}: boft_R {list(R.shape)} and boft_s "
            f"{list(s.shape)} are not square blocks and one factor per output"
        )
    return [AdapterEntry(module.name, "weight", "boft", (("R", R), ("s", s)))]
