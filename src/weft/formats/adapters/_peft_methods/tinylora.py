"""TinyLoRA: `tinylora_A`, `_B`, `_P` of each module, and `base_model.tinylora_v.0` and so on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_methods._forms import INTEGER, NUMBER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "TINYLORA"
SUFFIXES = {f".tinylora_{role}": role for role in "ABP"}
SHARED = {"base_model.tinylora_v.": "v"}
FIELDS = frozenset(
    {"u", "weight_tying", "projection_seed", "save_projection", "init_v_bound", "init_weights"}
    | {"tinylora_dropout"}
)
FORMS = {"weight_tying": NUMBER, "projection_seed": INTEGER}


def check(config: Mapping[str, Any]) -> Problem | None:
    if config.get("save_projection"):
        return None
    return Problem(
        "the file does not hold its projections (save_projection is false), and which seed drew a "
        "module's depends on the order of the modules in the model's code",
        "load it with PEFT, and save it again with save_projection=True",
    )


def read(module: Module) -> list[AdapterEntry] | Problem:
    config, vectors = module.config, module.shared
    sizes = module.sizes(A="r in", B="out r", P="u r r")
    if isinstance(sizes, Problem):
        return sizes
    groups = max(1, round(module.total * (1 - config["weight_tying"])))
    expected = {f"v{n}" for n in range(groups)}
    if set(vectors) != expected:
        wrong = sorted(expected - set(vectors)) or sorted(set(vectors) - expected)
        return Problem(
            f"{module.file} {'lacks' if len(vectors) < groups else 'has'} base_model.tinylora_v."
            f"{wrong[0].removeprefix('v')}: its {module.total} modules with weight_tying = "
            f"{config['weight_tying']} share {groups} vectors",
            "the file lost tensors: save or download the adapter again",
        )
    for ref in vectors.values():
        if ref.shape != (sizes["u"],):
            return Problem(
                f"{ref.name} in {ref.file} is {list(ref.shape)}, and does not fit tinylora_P "
                f"{list(module.tensors['P'].shape)} of module {module.name!r}"
            )
    params = (
        ("seed", config["projection_seed"]),
        ("modules", module.total),
        ("tying", float(config["weight_tying"])),
    )
    tensors = (*module.only("ABP"), *vectors.items())
    return [AdapterEntry(module.name, "weight", "tinylora", tensors, params=params)]
