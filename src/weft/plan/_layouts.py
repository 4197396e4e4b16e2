"""Layouts of other tools than Hugging Face's, as far as only the base can tell them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.names import unflatten
from weft.formats.adapters._config import TORCHTUNE_CONFIG
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from weft.core.specs import Adapter, AdapterEntry, Checkpoint

    Fit = Callable[[AdapterEntry, Checkpoint], AdapterEntry | Problem]

# Models whose norms are w + 1: mlx-lm adds the 1 when it loads their Hugging Face checkpoints.
_SHIFTED_NORMS = ("qwen3_next", "qwen3_5", "step3p5")
# What torchtune reads from Hugging Face with the rows of q and k in its own order, and as they are.
_REORDERED = {"llama", "mistral", "gemma", "gemma2"}
_AS_THEY_ARE = {"qwen2"}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def fitted(base: Checkpoint, adapter: Adapter) -> tuple[Adapter, list[Problem]]:
    """The adapter as Hugging Face would have it for `base`, and what cannot be said so."""
    if adapter.flattened:
        return _with_dots(base, adapter)
    fits: dict[str, Fit] = {"mlx-lm": _unshifted, "torchtune": _in_halves}
    if adapter.format not in fits:
        return adapter, []
    read = [fits[adapter.format](entry, base) for entry in adapter.entries]
    entries = tuple(entry for entry in read if not isinstance(entry, Problem))
    problems = [problem for problem in read if isinstance(problem, Problem)]
    return replace(adapter, entries=entries), list(dict.fromkeys(problems))


def _with_dots(base: Checkpoint, adapter: Adapter) -> tuple[Adapter, list[Problem]]:
    """Modules called as the base calls them; what it does not have keeps its flat name."""
    modules = [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
    found = unflatten({entry.module for entry in adapter.entries}, modules)
    problems = [
        Problem(
            f"{name} of {adapter.given} could be {' or '.join(readings[:4])} in {base.given}",
            "its dots became underscores when it was saved: save it in PEFT's form",
        )
        for name, readings in found.items()
        if len(readings) > 1
    ]
    entries = tuple(
        replace(entry, module=(found[entry.module] or (entry.module,))[0])
        for entry in adapter.entries
        if len(found[entry.module]) < 2
    )
    return replace(adapter, entries=entries), problems


def doubtful_copy(base: Checkpoint, adapter: Adapter) -> list[str]:
    """A warning where torchtune's copy in PEFT's form is not what it trained."""
    mixed = [entry for entry in adapter.entries if entry.module.rpartition(".")[2] in _HEADS]
    known = adapter.config.keys() <= TORCHTUNE_CONFIG and adapter.format == "PEFT"
    if not known or not mixed or base.config.get("model_type") not in _AS_THEY_ARE:
        return []
    warning = (
        f"if torchtune wrote {adapter.given}, the rows of its q_proj and k_proj are in the wrong "
        f"order for {base.config['model_type']}, and so is what PEFT makes of it: give torchtune's "
        "own adapter_model.pt instead"
    )
    return [warning]


def _unshifted(entry: AdapterEntry, base: Checkpoint) -> AdapterEntry | Problem:
    model = str(base.config.get("model_type"))
    ref = entry.tensors[0][1]
    norm = entry.kind == "replace" and len(ref.shape) == 1 and "norm" in entry.module
    if not norm or not model.startswith(_SHIFTED_NORMS):
        return entry
    return Problem(
        f"{ref.name} in {ref.file} is a whole norm of {model}, and mlx-lm adds 1 to those when it "
        f"loads a base such as {base.given}",
        "this release of weft does not merge full training of such models: train with LoRA",
    )


def _in_halves(entry: AdapterEntry, base: Checkpoint) -> AdapterEntry | Problem:
    """In place of `rotary` the number of heads, in each of which the rows are to be reordered."""
    params = dict(entry.params)
    if not params.pop("rotary", False):
        return entry
    model = config_value(base.config, "model_type")
    if model in _AS_THEY_ARE:
        return replace(entry, params=tuple(params.items()))
    file = entry.tensors[0][1].file
    if model not in _REORDERED:
        return Problem(
            f"{file} holds q_proj or k_proj, whose rows torchtune orders by the model, and that of "
            f"{base.given} is {model or 'not told'}",
            "give a base with its config.json, of Llama, Mistral, Gemma or Qwen2; or torchtune's "
            "copy in PEFT's form, adapter_model.safetensors",
        )
    field = _HEADS[entry.module.rpartition(".")[2]]
    heads = config_value(base.config, field) or config_value(base.config, "num_attention_heads")
    rows = dict(entry.tensors)["B"].shape[0]
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        return Problem(
            f"{entry.module} in {file} has {rows} rows, and the config.json of {base.given} says "
            f"{field} = {heads}",
            "is that the model that the adapter was trained on?",
        )
    return replace(entry, params=(*params.items(), ("rotary_heads", heads)))
