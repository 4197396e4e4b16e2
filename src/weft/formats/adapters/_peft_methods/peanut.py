"""PEANuT: `peanut_A.weight`, `peanut_B.weight`, `peanut_encoders.0.weight` and so on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry
from weft.formats.adapters._peft_config import rank_problem
from weft.formats.adapters._peft_methods._forms import NUMBER, choice

if TYPE_CHECKING:
    from weft.formats.adapters._peft_methods import Module

PEFT_TYPE = "PEANUT"
_DEPTH = 64
SUFFIXES = {
    ".peanut_A.weight": "A",
    ".peanut_B.weight": "B",
    **{f".peanut_encoders.{n}.weight": f"encoder{n}" for n in range(_DEPTH)},
    **{f".peanut_decoders.{n}.weight": f"decoder{n}" for n in range(_DEPTH)},
}
FIELDS = frozenset({"depth", "act_fn", "scaling", "init_weights"})
# Those of transformers that have no parameters of their own.
_ACTIVATIONS = (
    *("relu", "relu2", "relu6", "leaky_relu", "gelu", "gelu_python", "gelu_10", "gelu_new"),
    *("gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh", "quick_gelu"),
    *("silu", "swish", "hardswish", "mish", "tanh", "sigmoid", "linear"),
)
FORMS = {
    "depth": (lambda value: type(value) is int and 0 <= value <= _DEPTH, f"from 0 to {_DEPTH}"),
    "act_fn": choice(*_ACTIVATIONS),
    "scaling": NUMBER,
}


def read(module: Module) -> list[AdapterEntry] | Problem:
    config = module.config
    patterns = {"A": "r out", "B": "out r"}
    patterns |= {
        f"{what}{n}": "r r" for what in ("encoder", "decoder") for n in range(config["depth"])
    }
    sizes = module.sizes(**patterns)
    if isinstance(sizes, Problem):
        return sizes
    if wrong := rank_problem(module.name, module.file, sizes["r"], config):
        return wrong
    tensors, params = module.only(patterns), (("activation", config["act_fn"]),)
    return [AdapterEntry(module.name, "weight", "peanut", tensors, config["scaling"], params)]
