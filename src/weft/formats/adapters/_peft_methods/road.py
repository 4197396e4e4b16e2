"""RoAd: `road_theta` and `road_alpha`, for the weight and the bias that it may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods._forms import choice

if TYPE_CHECKING:
    from weft.core.specs import Param
    from weft.formats.adapters._peft_methods import Module

_VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


def _is_even(value: Any) -> bool:
    return type(value) is int and value > 0 and value % 2 == 0


PEFT_TYPE = "ROAD"
SUFFIXES = {".road_theta": "theta", ".road_alpha": "alpha"}
FIELDS = frozenset({"variant", "group_size", "init_weights"})
FORMS = {"variant": choice(*_VARIANTS), "group_size": (_is_even, "an even number above 0")}


def read(module: Module) -> list[AdapterEntry] | Problem:
    sizes = module.sizes(theta="n", alpha="n")
    if isinstance(sizes, Problem):
        return sizes
    params: tuple[tuple[str, Param], ...] = (
        ("variant", _VARIANTS[module.config["variant"]]),
        ("group", module.config["group_size"]),
    )
    tensors = module.only(("theta", "alpha"))
    return [
        AdapterEntry(module.name, "weight", "road", tensors, params=params),
        AdapterEntry(module.name, "bias", "road", tensors, params=params, optional=True),
    ]
