"""The layers of a model, found from the names of its tensors: no list of architectures.

A **stack** is a list of layers, such as `model.layers`: tensors named `PATH.NUMBER.REST`, numbered
from 0 on. A model of language has one; one that also sees or hears has one for each tower.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)
_BEHIND = 3  # layers behind the counted ones, at most
# What stands before the first layer; everything else that is in no layer comes after the last.
_BEFORE = re.compile(r"embed(?!_out)|embd|(^|\.)(wte|wpe|shared|rotary_pos_emb|relative_pe)(\.|$)")


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers `0 … count − 1` under `path`."""

    path: str
    count: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is: which layer of which stack, and its name inside; or in none."""

    stack: Stack | None
    layer: int
    rest: str


def stacks(names: Iterable[str], config: Mapping[str, Any]) -> list[Stack]:
    """The stacks among tensors of these names: what the config counts, or has attention inside.

    A list may go on behind the layers that are counted: what predicts further tokens stands there.
    """
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if parts := split(name):
            path, layer, rest = parts
            found[path][layer].add(rest)
    counts = set(_counts(config))
    stacks = []
    for path, layers in found.items():
        if sorted(layers) != list(range(len(layers))):
            continue
        less = [count for count in counts if 0 < len(layers) - count <= _BEHIND]
        if len(layers) in counts or _are_layers(layers):
            stacks.append(Stack(path, len(layers)))
        elif less and any("attn" in rest for rest in layers[0]):
            stacks.append(Stack(path, max(less)))
    alike = [p for p, layers in found.items() if _are_alike(layers)]
    return stacks or [Stack(path, len(found[path])) for path in alike]


def _are_alike(layers: Mapping[int, set[str]]) -> bool:
    whole = sorted(layers) == list(range(len(layers)))
    return whole and len({frozenset(rest) for rest in layers.values()}) == 1


def _are_layers(layers: Mapping[int, set[str]]) -> bool:
    """Alike, and with attention: layers of a tower that the config does not count."""
    attention = any(word in rest for rest in layers[0] for word in ("attn", "attention"))
    return len(layers) > 1 and attention and _are_alike(layers)


def split(name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.mlp.weight` -> (`model.layers`, 3, `mlp.weight`)."""
    parts = name.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    if not at:
        return None
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def place(name: str, known: Iterable[Stack]) -> Place:
    """The layer that the tensor `name` belongs to."""
    if parts := split(name):
        path, layer, rest = parts
        stack = next((each for each in known if each.path == path), None)
        if stack and layer < stack.count:
            return Place(stack, layer, rest)
    return Place(None, 0, name)


def comes_before(name: str) -> bool:
    """Whether a tensor that is in no layer stands before the first, as embeddings do."""
    return bool(_BEFORE.search(name))


def _counts(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif key in DEPTHS and isinstance(value, int):
            yield value
