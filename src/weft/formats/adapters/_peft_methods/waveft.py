"""WaveFT: `waveft_spectrum`; where its coefficients belong, the config's seed says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.core.units import clean
from weft.formats.adapters._peft_config import rank_problem
from weft.formats.adapters._peft_methods._forms import FLAG, INTEGER, NUMBER, PATTERNS

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
    "random_loc_seed": INTEGER,
    "n_frequency_pattern": PATTERNS,
    "proportional_parameters": FLAG,
    "use_idwt": FLAG,
    "wavelet_family": (lambda value: isinstance(value, str), "a string"),
}
_FAMILIES = {
    *(f"db{n}" for n in range(1, 11)),
    *(f"sym{n}" for n in range(2, 11)),
    *(f"coif{n}" for n in range(1, 4)),
}


def check(config: Mapping[str, Any]) -> Problem | None:
    family = config.get("wavelet_family")
    if not config.get("use_idwt") or not isinstance(family, str) or family in _FAMILIES:
        return None
    if family in ("coif4", "coif5"):
        return Problem(
            f"PEFT 0.21 has a filter for {family} that is not a wavelet's, and the file does not "
            "say which one trained it"
        )
    return Problem(f"wavelet_family {clean(repr(family))} is not one that PEFT can train with")


def read(module: Module) -> list[AdapterEntry] | Problem:
    spectrum, config = module.tensors["spectrum"], module.config
    sizes = module.sizes(spectrum="n")
    if isinstance(sizes, Problem):
        return sizes
    wrong = rank_problem(
        module.name, module.file, spectrum.shape[0], config, "n_frequency", "n_frequency_pattern"
    )
    if wrong and not config.get("proportional_parameters"):
        return wrong
    family = config["wavelet_family"] if config["use_idwt"] else ""
    params = (("seed", config["random_loc_seed"]), ("family", family))
    tensors = (("spectrum", spectrum),)
    return [AdapterEntry(module.name, "weight", "waveft", tensors, config["scaling"], params)]
