"""OFT: `oft_R.weight`, or `oft_embedding_R.weight` on an Embedding; up to PEFT 0.13 `oft_r`."""

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
SUFFIXES = {
    ".oft_R.weight": "R",
    ".oft_embedding_R.weight": "embedding_R",
    ".oft_r": "outputs",
}
FIELDS = frozenset(
    {"oft_block_size", "module_dropout", "init_weights", "coft", "eps", "block_share"}
    | {"use_cayley_neumann", "num_cayley_neumann_terms"}
)
FORMS = {
    "coft": FLAG,
    "block_share": FLAG,
    "use_cayley_neumann": FLAG,
    "eps": NUMBER,
    "num_cayley_neumann_terms": (lambda value: value is None or POSITIVE[0](value), POSITIVE[1]),
}


def check(config: Mapping[str, Any]) -> Problem | None:
    if "use_cayley_neumann" in config or "oft_block_size" not in config:
        return None
    return Problem(
        "OFT of PEFT 0.14 and 0.15 trained another parametrisation than releases before and after",
        "merge it with PEFT 0.15's merge_and_unload",
    )


def read(module: Module) -> list[AdapterEntry] | Problem:
    if "use_cayley_neumann" not in module.config:
        return _of_outputs(module)
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


def _of_outputs(module: Module) -> list[AdapterEntry] | Problem:
    """Up to 0.13, `r` blocks that rotate the outputs."""
    sizes, config = module.sizes(outputs="blocks n n"), module.config
    if isinstance(sizes, Problem):
        return sizes
    blocks = config.get("r")
    if type(blocks) is not int or sizes["blocks"] != (1 if config.get("block_share") else blocks):
        return module.misfit(f"is not what it should be: r is {blocks!r}")
    params: list[tuple[str, Param]] = [("blocks", blocks)]
    if config.get("coft"):
        params.append(("eps", float(config["eps"])))
    tensors = (("R", module.tensors["outputs"]),)
    return [AdapterEntry(module.name, "weight", "oft_outputs", tensors, params=tuple(params))]
