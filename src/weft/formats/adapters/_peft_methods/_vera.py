"""What VeRA and PVeRA share: two vectors per module, and two matrices for all, saved or drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem
from weft.formats.adapters._peft_methods._forms import FLAG, INTEGER, one_of

if TYPE_CHECKING:
    from weft.core.specs import Param
    from weft.formats.adapters._peft_methods import Module

FIELDS = frozenset({"projection_prng_key", "save_projection", "d_initial", "init_weights"})
FORMS = {"projection_prng_key": INTEGER, "save_projection": FLAG, "init_weights": one_of()}


def read_module(module: Module, name: str, *, halved: bool) -> list[AdapterEntry] | Problem:
    """The entry of one module; `name` is the prefix of the keys.

    Projections in the file are taken, whatever `save_projection` says: they are what was trained.
    """
    drawn = not module.shared and not module.config.get("save_projection")
    whole = replace(module, tensors={**module.tensors, **module.shared})
    patterns = {"lambda_b": "_", "lambda_d": "r"}
    if not drawn:
        patterns |= {"A": "r _", "B": "_ h" if halved else "_ r"}
    whole = replace(whole, endings={**whole.endings, "A": f"{name}_A", "B": f"{name}_B"})
    sizes = whole.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    if halved and sizes["r"] != 2 * sizes.get("h", sizes["r"] // 2):
        return whole.misfit("do not halve")
    rank = sizes["r"] // 2 if halved else sizes["r"]
    if wrong := rank_problem(module.name, module.file, rank, module.config):
        return wrong
    params: tuple[tuple[str, Param], ...] = (("halved", halved),)
    if drawn:
        params = (*params, ("seed", module.config["projection_prng_key"]))
    return [AdapterEntry(module.name, "weight", "vera", whole.only(patterns), params=params)]
