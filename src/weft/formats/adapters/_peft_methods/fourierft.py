"""FourierFT: `fourierft_spectrum`; where its entries belong, the config's seed says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem
from weft.formats.adapters._peft_methods._forms import INTEGER, NUMBER, PATTERNS

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "FOURIERFT"
SUFFIXES = {".fourierft_spectrum": "spectrum"}
FIELDS = frozenset(
    {"n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights"}
)
FORMS = {"scaling": NUMBER, "random_loc_seed": INTEGER, "n_frequency_pattern": PATTERNS}


def read(module: Module) -> list[AdapterEntry] | Problem:
    spectrum, config = module.tensors["spectrum"], module.config
    sizes = module.sizes(spectrum="n")
    if isinstance(sizes, Problem):
        return sizes
    wrong = rank_problem(
        module.name, module.file, spectrum.shape[0], config, "n_frequency", "n_frequency_pattern"
    )
    if wrong:
        return wrong
    tensors, params = (("spectrum", spectrum),), (("seed", config["random_loc_seed"]),)
    return [AdapterEntry(module.name, "weight", "fourierft", tensors, config["scaling"], params)]
