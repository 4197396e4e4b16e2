"""HiRA: `hira_A`, `hira_B`; in an embedding `hira_embedding_A`, `hira_embedding_B`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods._forms import one_of

if TYPE_CHECKING:
    from weft.core.specs import Param
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "HIRA"
SUFFIXES = {
    ".hira_A": "A",
    ".hira_B": "B",
    ".hira_embedding_A": "embedding_A",
    ".hira_embedding_B": "embedding_B",
}
FIELDS = frozenset({"hira_dropout", "init_weights"})
FORMS = {"init_weights": one_of("gaussian")}


# The rank is that of the tensors: the weight does not depend on what the config says it is, and
# PEFT 0.21 writes a rank_pattern that it does not follow.
def read(module: Module) -> list[AdapterEntry] | Problem:
    embedding = "embedding_A" in module.tensors or "embedding_B" in module.tensors
    a, b = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    sizes = module.sizes(**{a: "r _ ...", b: "_ r ..."})
    if isinstance(sizes, Problem):
        return sizes
    tensors = (("A", module.tensors[a]), ("B", module.tensors[b]))
    params: tuple[tuple[str, Param], ...] = (("transposed", True),) if embedding else ()
    return [AdapterEntry(module.name, "weight", "hira", tensors, params=params)]
