"""Trainable tokens: `trainable_tokens_delta`, the new rows of the tokens in `token_indices`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.formats.adapters._peft_methods._forms import one_of
from weft.formats.adapters._peft_methods._tokens import token_rows

if TYPE_CHECKING:
    from weft.core.specs import AdapterEntry
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "TRAINABLE_TOKENS"
SUFFIXES = {".trainable_tokens_delta": "rows"}
FIELDS = frozenset({"token_indices", "init_weights"})
FORMS = {"init_weights": one_of()}


def read(module: Module) -> list[AdapterEntry] | Problem:
    entry = token_rows(module.name, module.tensors["rows"], module.config, "token_indices")
    return entry if isinstance(entry, Problem) else [entry]
