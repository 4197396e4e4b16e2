"""LoKr: `lokr_w1` or `lokr_w1_a`, `lokr_w1_b`; `lokr_w2` or `lokr_w2_a`, `lokr_w2_b`, `lokr_t2`.

PEFT before 0.14 trains with scaling 1, whatever `alpha` says. It wrote no version into its configs,
which are known by the field that they lack: `exclude_modules` came with 0.14, to every method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import CONFIG, matching, scaling_of, undecided
from weft.formats.adapters._peft_methods._forms import NUMBER, one_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "LOKR"
SUFFIXES = {f".lokr_{role}": role for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
FIELDS = frozenset(
    {"r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout"}
    | {"use_effective_conv2d", "decompose_both", "decompose_factor", "rank_dropout_scale"}
    | {"init_weights"}
)
FORMS = {"alpha": NUMBER, "init_weights": one_of("lycoris")}


def notes(config: Mapping[str, Any]) -> list[str]:
    patterns = config.get("alpha_pattern") or config.get("rank_pattern")
    if not _unscaled(config) or (config.get("alpha") == config.get("r") and not patterns):
        return []
    note = (
        f"{CONFIG} has no exclude_modules, as of PEFT before 0.14, which trains LoKr without "
        "alpha / r: merged so; if a later release trained it, add exclude_modules with null"
    )
    return [note]


def _unscaled(config: Mapping[str, Any]) -> bool:
    return "exclude_modules" not in config


def read(module: Module) -> list[AdapterEntry] | Problem:
    patterns = _patterns(module)
    sizes = module.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    rank = _rank(module)
    if isinstance(rank, Problem):
        return rank
    if sizes.get("r", rank) != rank:
        return Problem(
            f"module {module.name!r} in {module.file} has rank {sizes['r']}, and {CONFIG} says "
            f"{rank}",
            "the config and the weights are not of one save",
        )
    scaling = scaling_of(module.name, rank, module.config, "alpha")
    if isinstance(scaling, Problem):
        return scaling
    if _unscaled(module.config):
        scaling = 1.0
    return [AdapterEntry(module.name, "weight", "lokr", module.only(patterns), scaling)]


def _patterns(module: Module) -> dict[str, str]:
    there = module.tensors
    one = {"w1": "_ _"} if "w1" in there else {"w1_a": "_ r", "w1_b": "r _"}
    if "w2" in there:
        return one | {"w2": "_ _ ..."}
    if "t2" in there:
        return one | {"w2_a": "r _", "w2_b": "r _", "t2": "r r ..."}
    return one | {"w2_a": "_ r", "w2_b": "r _"}


def _rank(module: Module) -> int | Problem:
    """The divisor of alpha, which no tensor shows where both factors are full."""
    ranks = matching(module.config.get("rank_pattern"), module.name) or [module.config.get("r")]
    if len(set(ranks)) > 1:
        return undecided(module.name, "rank_pattern", ranks)
    if type(ranks[0]) is not int or ranks[0] < 1:
        return Problem(f"module {module.name!r}: {CONFIG} says r = {ranks[0]!r}")
    return ranks[0]
