"""PVeRA: as VeRA, with means and log-variances in `pvera_lambda_d` and `pvera_A`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.formats.adapters._peft_methods import _vera
from weft.formats.adapters._peft_methods._forms import FLAG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.specs import AdapterEntry
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "PVERA"
SUFFIXES = {".pvera_lambda_b": "lambda_b", ".pvera_lambda_d": "lambda_d"}
SHARED = {"base_model.pvera_A": "A", "base_model.pvera_B": "B"}
FIELDS = _vera.FIELDS | {"pvera_dropout", "sample_at_inference", "generator_seed"}
FORMS = {**_vera.FORMS, "sample_at_inference": FLAG}


def check(config: Mapping[str, Any]) -> Problem | None:
    if not config.get("sample_at_inference"):
        return None
    return Problem(
        "PVeRA with sample_at_inference draws its output anew each time: no merged weight",
        "set it to false in adapter_config.json to merge the mean, as PEFT's merge does",
    )


def read(module: Module) -> list[AdapterEntry] | Problem:
    return _vera.read_module(module, "pvera", halved=True)
