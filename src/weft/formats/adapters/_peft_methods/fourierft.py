"""FourierFT: `fourierft_spectrum`; where its entries belong, the config's seed says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import NUMBER, PATTERNS, WHOLE, rank_problem

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "FOURIERFT"
SUFFIXES = {".fourierft_spectrum": "spectrum"}
FIELDS = frozenset(
    {"n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights"}
)
FORMS = {"scaling": NUMBER, "random_loc_seed": WHOLE, "n_frequency_pattern": PATTERNS}


def read(module: Module) -> list[AdapterEntry] | Problem:
    spectrum, config = module.tensors["spectrum"], module.config
    if len(spectrum.shape) != 1:
        return Problem(f"{spectrum.name} in {spectrum.file} is {list(spectrum.shape)}, no vector")
    wrong = rank_problem(module.name, spectrum, config, "n_frequency", "n_frequency_pattern")
    if wrong:
        return wrong
    scaling, seed = config.get("scaling", 150.0), config.get("random_loc_seed", 777)
    tensors = (("spectrum", spectrum),)
    return [AdapterEntry(module.name, "weight", "fourierft", tensors, scaling, (("seed", seed),))]
