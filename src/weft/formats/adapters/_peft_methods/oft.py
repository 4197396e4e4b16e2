"""OFT: `oft_R.weight`, or `oft_embedding_R.weight` on an Embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods._forms import FLAG, NUMBER, POSITIVE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.specs import Param
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "OFT"
SUFFIXES = {".oft_R.weight": "R", ".oft_embedding_R.weight": "embedding_R"}
FIELDS = frozenset(
    {"oft_block_size", "module_dropout", "init_weights", "coft", "eps", "block_share"}
    | {"use_cayley_neumann", "num_cayley_neumann_terms"}
)
FORMS = {
    "coft": FLAG,
    "block_share": FLAG,
    "use_cayley_neumann": FLAG,
    "eps": NUMBER,
    "num_cayley_neumann_terms": POSITIVE,
}


def check(config: Mapping[str, Any]) -> Problem | None:
    if "use_cayley_neumann" in config:
        return None
    return Problem(
        "OFT of PEFT before 0.16 trained another parametrisation than later ones",
        "merge it with PEFT 0.15's merge_and_unload",
    )


def read(module: Module) -> list[AdapterEntry] | Problem:
    role = "embedding_R" if "embedding_R" in module.tensors else "R"
    sizes, config = module.sizes(**{role: "blocks n"}), module.config
    if isinstance(sizes, Problem):
        return sizes
    params: list[tuple[str, Param]] = [("shared", bool(config.get("block_share")))]
    if config.get("coft"):
        params.append(("eps", float(config["eps"])))
    if config["use_cayley_neumann"]:
        params.append(("terms", config["num_cayley_neumann_terms"]))
        # PEFT says its version from 0.18 on, the first that counts the last power once.
        params.append(("halved", bool(config.get("peft_version"))))
    if role == "embedding_R":
        params.append(("embedding", True))
    tensors = (("R", module.tensors[role]),)
    return [AdapterEntry(module.name, "weight", "oft", tensors, params=tuple(params))]
