"""RoAd: `road_theta` and `road_alpha`, for the weight and the bias that it may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import CONFIG, one_of
from weft.formats.adapters._peft_methods import lacks

if TYPE_CHECKING:
    from weft.core.specs import Param
    from weft.formats.adapters._peft_methods import Module

_VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


def _is_even(value: Any) -> bool:
    return type(value) is int and value > 0 and value % 2 == 0


PEFT_TYPE = "ROAD"
SUFFIXES = {".road_theta": "theta", ".road_alpha": "alpha"}
FIELDS = frozenset({"variant", "group_size", "init_weights"})
FORMS = {"variant": one_of(*_VARIANTS), "group_size": (_is_even, "an even number above 0")}


def read(module: Module) -> list[AdapterEntry] | Problem:
    if missing := lacks(module, road_theta="theta", road_alpha="alpha"):
        return missing
    theta, alpha = module.tensors["theta"], module.tensors["alpha"]
    if theta.shape != alpha.shape or len(theta.shape) != 1:
        return Problem(
            f"module {module.name!r} in {module.file}: road_theta {list(theta.shape)} and "
            f"road_alpha {list(alpha.shape)} are not two vectors of one length"
        )
    if absent := [field for field in FORMS if field not in module.config]:
        return Problem(f"module {module.name!r} in {module.file}: {CONFIG} has no {absent[0]}")
    params: tuple[tuple[str, Param], ...] = (
        ("variant", _VARIANTS[module.config["variant"]]),
        ("group", module.config["group_size"]),
    )
    tensors = (("theta", theta), ("alpha", alpha))
    return [
        AdapterEntry(module.name, "weight", "road", tensors, params=params),
        AdapterEntry(module.name, "bias", "road", tensors, params=(*params, ("optional", True))),
    ]
