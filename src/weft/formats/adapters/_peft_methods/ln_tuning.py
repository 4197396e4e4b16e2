"""LN tuning (arXiv:2312.11420): whole layers, as a rule norms, in place of the base's.

The keys are those of the layer, behind `ln_tuning_layers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.specs import AdapterEntry

if TYPE_CHECKING:
    from weft.core.errors import Problem
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "LN_TUNING"
_PARAMETERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SUFFIXES = {f".ln_tuning_layers.{name}": name for name in _PARAMETERS}
FIELDS: frozenset[str] = frozenset()


def read(module: Module) -> list[AdapterEntry] | Problem:
    return [
        AdapterEntry(module.name, parameter, "replace", (("value", ref),))
        for parameter, ref in module.tensors.items()
    ]
