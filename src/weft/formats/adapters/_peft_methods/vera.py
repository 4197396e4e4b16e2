"""VeRA: `vera_lambda_b`, `vera_lambda_d`, and `base_model.vera_A`, `base_model.vera_B` for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.formats.adapters._peft_methods import _vera

if TYPE_CHECKING:
    from weft.core.errors import Problem
    from weft.core.specs import AdapterEntry
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "VERA"
SUFFIXES = {".vera_lambda_b": "lambda_b", ".vera_lambda_d": "lambda_d"}
SHARED = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
FIELDS = _vera.FIELDS | {"vera_dropout"}
FORMS = _vera.FORMS


def read(module: Module) -> list[AdapterEntry] | Problem:
    return _vera.read_module(module, "vera", halved=False)
