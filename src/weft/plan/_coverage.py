"""The modules of an adapter held against those that its config names: too many, or too few.

Neither stops a merge: the tensors are merged as the file has them. But PEFT leaves the first out
when it loads the adapter, and of the second something may have been lost.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from weft.core.names import edit
from weft.core.selection import numbers
from weft.core.units import some
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.selection import Selection
    from weft.core.specs import Adapter, Checkpoint

# What other fields of a config name: modules_to_save, bias, trainable_token_indices.
_NAMED_ELSEWHERE = ("replace", "trainable_tokens")
# Of fused experts target_parameters speaks, or what PEFT made of target_modules.
_EXPERTS = ("lora_experts", "lora_expert", "lora_stacked")


def doubts(base: Checkpoint, adapter: Adapter, names: Mapping[str, str]) -> list[str]:
    """What of the adapter its own config does not explain, one line for each kind.

    Args:
        base: The base model.
        adapter: The adapter.
        names: Where its targets were found: target -> name of the base's tensor.
    """
    lost_biases = _lost_biases(base, adapter, names)
    if adapter.selection is None:
        return lost_biases
    entries = [
        entry for entry in adapter.entries if entry.kind not in (*_NAMED_ELSEWHERE, *_EXPERTS)
    ]
    found = lost_biases
    if others := unnamed(adapter):
        found.append(
            f"{adapter.given} adapts {some(others, 'module')}, which its config does not name in "
            "target_modules: it is merged as it is in the file, and PEFT would leave it out; are "
            "the config and the weights of one save?"
        )
    placed = {names[entry.target]: entry.target for entry in entries if entry.target in names}
    if lost := _lost(base, adapter.selection, placed):
        found.append(
            f"{adapter.given} does not adapt {some(lost, 'module')}, though its config names it in "
            "target_modules and it does so in other layers: a save that lost tensors, or layers "
            "left out without layers_to_transform? Look at another save of the training"
        )
    return found


def unnamed(adapter: Adapter) -> list[str]:
    """Modules with factors that no field of the config can mean."""
    selection = adapter.selection
    entries = [
        entry for entry in adapter.entries if entry.kind not in (*_NAMED_ELSEWHERE, *_EXPERTS)
    ]
    # Who names an nn.MultiheadAttention names its output, too.
    outputs = {f"{e.module}.out_proj" for e in entries if e.parameter == "in_proj_weight"}
    modules = dict.fromkeys(entry.module for entry in entries if entry.module not in outputs)
    return [module for module in modules if selection and not selection.names(module)]


def _lost_biases(base: Checkpoint, adapter: Adapter, names: Mapping[str, str]) -> list[str]:
    """PEFT 0.7 to 0.20 trained the biases of `lora_only` and did not save them."""
    trained = adapter.config.get("bias")
    saved = any(e.parameter == "bias" and e.kind == "replace" for e in adapter.entries)
    weights = [name for name in names.values() if name.endswith(".weight")]
    biases = [n for w in weights if (n := w.removesuffix("weight") + "bias") in base.tensors]
    if trained not in ("all", "lora_only") or saved or not biases:
        return []
    warning = (
        f"{adapter.given} says bias={trained!r}, {base.given} has {len(biases)} of these biases, "
        "and none is in the file: PEFT 0.7 to 0.20 trained them and did not save them; the merged "
        "model has the base's"
    )
    return [warning]


def _lost(base: Checkpoint, selection: Selection, placed: Mapping[str, str]) -> list[str]:
    """Modules that the config promises and the file lacks, though it has their like elsewhere."""
    alike = {_without_numbers(name): (name, target) for name, target in placed.items()}
    lost = []
    for name, ref in base.tensors.items():
        if name in placed or len(ref.shape) != 2 or _without_numbers(name) not in alike:
            continue
        there, target = alike[_without_numbers(name)]
        off, on = edit(target, there)
        module = (off + name.removeprefix(on)).removesuffix(".weight")
        if selection.promises(module) and not _is_spare(module, base):
            lost.append(module)
    return lost


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _is_spare(module: str, base: Checkpoint) -> bool:
    """On disk, and not in the model: layers that predict further tokens, keys of shared layers."""
    layers = config_value(base.config, "num_hidden_layers")
    shared = config_value(base.config, "num_kv_shared_layers") or 0
    found = numbers(module)
    if not found or type(layers) is not int or type(shared) is not int:
        return False
    leaf = module.rpartition(".")[2]
    return found[0] >= layers - (shared if leaf in ("k_proj", "v_proj") else 0)
