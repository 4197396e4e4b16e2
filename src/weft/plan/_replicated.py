"""`layer_replication`: an adapter for a deeper model, made of the base's layers several times over.

PEFT shares the base's weights between the copies, and gives each its own factors. A merged model
cannot share what has become different, so the output has the copies as layers of their own.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weft.core.specs import Adapter, Checkpoint, TensorRef

# Where PEFT looks for layers: in Llama and its like, in BERT, in Falcon.
_LAYER = re.compile(r"^((?:.*?\.)?(?:layers|encoder\.layer|h))\.(0|[1-9][0-9]*)\.(.+)$")
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Fields with the numbers of the layers that are special.
NUMBERS = ("mlp_only_layers", "moe_layers", "cross_attention_layers")
# Fields from which a layer's number tells what kind it is, unless one of the lists does so; and the
# value that makes them all alike.
_BY_NUMBER = {
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "interleave_moe_layer_step": 1,
    "moe_layer_freq": 1,
    "attn_layer_period": 1,
    "expert_layer_period": 1,
}
# The same of attention, where no `layer_types` lists the kinds.
_ATTENTION_BY_NUMBER = {
    "sliding_window_pattern": 1,
    "global_attn_every_n_layers": 1,
    "no_rope_layer_interval": 1,
    "full_attention_interval": 1,
}
KINDS = "layer_types"  # which attention each layer has
# Models whose code alternates the kinds where no list says them: the field with the period, if
# there is one, and the usual period.
_PERIODS: dict[str, tuple[str | None, int]] = {
    "gemma2": (None, 2),
    "gemma3_text": ("sliding_window_pattern", 6),
    "cohere2": ("sliding_window_pattern", 4),
}
_ALTERNATING = {*_PERIODS, "gpt_neo"}


def replicated(
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
) -> tuple[Checkpoint, list[Problem], list[str]]:
    """The base with as many layers as the adapters were trained on, what forbids it, and notes."""
    maps = {str(a.config.get("layer_replication") or []) for a, _ in adapters}
    ranges = next((r for a, _ in adapters if (r := a.config.get("layer_replication"))), None)
    if ranges is None:
        return base, [], []
    given = ", ".join(adapter.given for adapter, _ in adapters)
    if len(maps) > 1:
        what = f"{given} differ in layer_replication, and so in the model that they change"
        return base, [Problem(what, "merge them one by one")], []
    order = [layer for start, stop in ranges for layer in range(start, stop)]
    lists: dict[str, set[int]] = defaultdict(set)
    for name in base.tensors:
        if found := _LAYER.match(name):
            lists[found[1]].add(int(found[2]))
    problems = _misfits(given, order, lists, base)
    if problems:
        return base, problems, []
    ((path, layers),) = lists.items()
    config = deeper(base.config, order, len(layers))
    problems = _numbered(given, config)
    text = " ".join(map(str, order))
    note = f"{given}: {path} has {len(order)} layers now, copies of the base's {text}"
    return replace(base, tensors=_copies(base.tensors, order), config=config), problems, [note]


def _misfits(
    given: str, order: Sequence[int], lists: Mapping[str, set[int]], base: Checkpoint
) -> list[Problem]:
    if len(lists) != 1:
        found = " and ".join(lists) or "none"
        what = (
            f"{given} replicates layers, and {base.given} has {found}: one list of them is needed"
        )
        return [Problem(what, "merge it with PEFT's merge_and_unload")]
    ((path, layers),) = lists.items()
    if missing := sorted(set(order) - layers):
        what = (
            f"{given} replicates layer {missing[0]}, and {path} of {base.given} has {len(layers)}"
        )
        return [Problem(what, f"is {base.given} the model that the adapter was trained on?")]
    return []


def _copies(tensors: Mapping[str, TensorRef], order: Sequence[int]) -> dict[str, TensorRef]:
    """The same bytes under the name of every copy; a layer that is in no range goes."""
    places: dict[int, list[int]] = defaultdict(list)
    for new, old in enumerate(order):
        places[old].append(new)
    made = {}
    for name, ref in tensors.items():
        found = _LAYER.match(name)
        if not found:
            made[name] = ref
            continue
        for new in places[int(found[2])]:
            made[f"{found[1]}.{new}.{found[3]}"] = ref
    return made


def deeper(config: Mapping[str, Any], order: Sequence[int], before: int) -> dict[str, Any]:
    """The config of the deeper model: the number of layers, and what there is for each of them."""
    deeper: dict[str, Any] = copy.deepcopy(dict(config))
    parts: list[dict[str, Any]] = [deeper, *(v for v in deeper.values() if isinstance(v, dict))]
    for part in parts:
        if not any(part.get(key) == before for key in DEPTH):
            continue
        for key, value in part.items():
            if key in DEPTH and value == before:
                part[key] = len(order)
            elif key in NUMBERS and isinstance(value, list):
                part[key] = [new for new, old in enumerate(order) if old in value]
            elif isinstance(value, list) and len(value) == before and per_layer(key):
                part[key] = [value[old] for old in order]
    return deeper


def per_layer(key: str) -> bool:
    return any(word in key for word in ("layer", "block", "mixer"))


def _numbered(given: str, config: Mapping[str, Any]) -> list[Problem]:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return [
        Problem(
            f"{given} replicates layers, and the base's config gives a layer its kind by its "
            f"number ({reason}): a copy would become another kind",
            "merge it with PEFT's merge_and_unload",
        )
        for part in parts
        for reason in told_by_number(part)
    ]


def attention_kinds(part: Mapping[str, Any]) -> list[str] | None:
    """`layer_types` of a config, or the list that transformers makes where there is none.

    With a period p layer n, counted from 0, has full attention where p divides n + 1, and a
    sliding window elsewhere.
    """
    listed, kind = part.get(KINDS), part.get("model_type")
    if isinstance(listed, list):
        return listed
    if kind not in _PERIODS:
        return None
    field, usual = _PERIODS[kind]
    period, depth = part.get(field, usual) if field else usual, part.get("num_hidden_layers")
    if not isinstance(period, int) or not isinstance(depth, int) or period < 1:
        return None
    return [
        "full_attention" if n % period == 0 else "sliding_attention" for n in range(1, depth + 1)
    ]


def told_by_number(part: Mapping[str, Any]) -> list[str]:
    """Why the number of a layer tells what it is."""
    fields = dict(_BY_NUMBER) if not part.get("moe_layers") else {}
    found = []
    if not isinstance(part.get(KINDS), list):
        fields |= _ATTENTION_BY_NUMBER
        if part.get("use_sliding_window") and isinstance(part.get("max_window_layers"), int):
            found.append(f"max_window_layers = {part['max_window_layers']}")
        if part.get("model_type") in _ALTERNATING:
            found.append(f"model_type = {part['model_type']}")
    found += [
        f"{key} = {part[key]}"
        for key, alike in fields.items()
        if isinstance(part.get(key), int) and part[key] != alike
    ]
    return found
