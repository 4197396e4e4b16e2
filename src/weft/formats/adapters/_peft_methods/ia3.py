"""(IA)³: `ia3_l`, (out, 1), or (1, in) in modules that `feedforward_modules` names.

Of a convolution it is (1, channels, 1…) either way. What scales the outputs scales the bias, too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods._forms import NAMES_OR_EXPRESSION, one_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.errors import Problem
    from weft.core.specs import Param
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "IA3"
SUFFIXES = {".ia3_l": "l"}
FIELDS = frozenset({"feedforward_modules", "init_ia3_weights"})
FORMS = {"feedforward_modules": NAMES_OR_EXPRESSION, "init_ia3_weights": one_of()}


def read(module: Module) -> list[AdapterEntry] | Problem:
    factors = module.tensors["l"]
    feedforward = _is_feedforward(module.name, module.config)
    of_matrix = (1, factors.numel) if feedforward else (factors.numel, 1)
    of_convolution = (1, factors.numel, *(1 for _ in factors.shape[2:]))
    if factors.shape != (of_convolution if len(factors.shape) > 2 else of_matrix):
        which = "names" if feedforward else "does not name"
        return module.misfit(f"is not what it should be: feedforward_modules {which} the module")
    params: tuple[tuple[str, Param], ...] = (("feedforward", feedforward),)
    tensors = module.only("l")
    weight = AdapterEntry(module.name, "weight", "ia3", tensors, params=params)
    if feedforward:
        return [weight]
    bias = AdapterEntry(module.name, "bias", "ia3", tensors, params=params, optional=True)
    return [weight, bias]


def _is_feedforward(module: str, config: Mapping[str, Any]) -> bool:
    """As PEFT sees it: an expression for the whole name, or endings, without a dot before them."""
    names = config.get("feedforward_modules") or []
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names)
