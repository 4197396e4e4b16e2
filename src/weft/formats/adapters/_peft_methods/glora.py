"""GLoRA: `glora_A` to `glora_E`, each as `.Xd` and `.Xu`, as `.X`, or, where it is off, `.zeros`.

C, D and E change the bias, and C takes the weight for it. A module without a bias has zeros there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "GLORA"
SUFFIXES = {
    f".glora_{path}.{form}": role
    for path in "ABCDE"
    for form, role in {
        "Xd": f"{path}_left",
        "Xu": f"{path}_right",
        "X": path,
        "zeros": path,
    }.items()
}
FIELDS = frozenset({"config_A_B", "config_C", "config_D_E", "init_weights"})


def read(module: Module) -> list[AdapterEntry] | Problem:
    """What the config says of the forms, the tensors show."""
    patterns: dict[str, str] = {}
    for path in "ABCDE":
        if f"{path}_left" in module.tensors or f"{path}_right" in module.tensors:
            patterns |= {f"{path}_left": f"_ r{path}", f"{path}_right": f"r{path} _"}
        elif path not in module.tensors:
            there = ", ".join(ref.name for ref in module.tensors.values())
            what = f"module {module.name!r} in {module.file} has {there} and lacks glora_{path}"
            return Problem(what, "the file lost tensors: save or download the adapter again")
        else:
            patterns[path] = "_ ..."
    sizes = module.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    weight = module.only(role for role in patterns if role[0] in "AB")
    bias = module.only(role for role in patterns if role[0] in "CDE")
    return [
        AdapterEntry(module.name, "weight", "glora", weight),
        AdapterEntry(module.name, "bias", "glora_bias", bias, reads="weight", optional=True),
    ]
