"""WaveFT: `waveft_spectrum`; where its coefficients belong, the config's seed says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.core.units import clean
from weft.formats.adapters._peft_config import FLAG, NUMBER, PATTERNS, TEXT, WHOLE, rank_problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "WAVEFT"
SUFFIXES = {".waveft_spectrum": "spectrum"}
FIELDS = frozenset(
    {"n_frequency", "n_frequency_pattern", "proportional_parameters", "scaling", "init_weights"}
    | {"random_loc_seed", "use_idwt", "wavelet_family"}
)
FORMS = {
    "scaling": NUMBER,
    "random_loc_seed": WHOLE,
    "n_frequency_pattern": PATTERNS,
    "proportional_parameters": FLAG,
    "use_idwt": FLAG,
    "wavelet_family": TEXT,
}
_FAMILIES = {
    *(f"db{n}" for n in range(1, 11)),
    *(f"sym{n}" for n in range(2, 11)),
    *(f"coif{n}" for n in range(1, 4)),
}


def check(config: Mapping[str, Any]) -> Problem | None:
    family = config.get("wavelet_family", "db1")
    if not config.get("use_idwt", True) or family in _FAMILIES:
        return None
    if family in ("coif4", "coif5"):
        return Problem(
            f"PEFT 0.21 has a filter for {family} that is not a wavelet's, and the file does not "
            "say which one trained it"
        )
    return Problem(f"wavelet_family {clean(repr(family))} is not one that PEFT can train with")


def read(module: Module) -> list[AdapterEntry] | Problem:
    spectrum, config = module.tensors["spectrum"], module.config
    if len(spectrum.shape) != 1:
        return Problem(f"{spectrum.name} in {spectrum.file} is {list(spectrum.shape)}, no vector")
    wrong = rank_problem(module.name, spectrum, config, "n_frequency", "n_frequency_pattern")
    if wrong and not config.get("proportional_parameters"):
        return wrong
    scaling, seed = config.get("scaling", 25.0), config.get("random_loc_seed", 777)
    family = config.get("wavelet_family", "db1") if config.get("use_idwt", True) else ""
    params = (("seed", seed), ("family", family))
    tensors = (("spectrum", spectrum),)
    return [AdapterEntry(module.name, "weight", "waveft", tensors, scaling, params)]
