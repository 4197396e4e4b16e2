"""Keys that a save, a wrapper or another tool has disturbed -> the keys that PEFT writes.

Only what has one reading is repaired: a wrapper's name is taken out, a prefix is put back. Each
rule says in a line what it did; `weft doctor` lists them, and `weft merge --strict` refuses them.
What needs the base to be decided (renamed modules) is decided where names are matched.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import Repair

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PREFIX = "base_model.model."
WHOLE = "base_model."  # what stands before tensors that all modules use
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
_TWINS = {
    "lora_down": "lora_A",
    "lora_up": "lora_B",
}  # Kohya's and diffusers' words for the factors


@dataclass(frozen=True, slots=True)
class Repaired:
    """Sound key -> the key in the file, what was repaired, and what has no single reading."""

    keys: dict[str, str]
    repairs: tuple[Repair, ...]
    problems: tuple[Problem, ...]


def repair(keys: Iterable[str], endings: Iterable[str], *, nested: bool = False) -> Repaired:
    """Bring every key into the form that PEFT writes.

    Args:
        keys: Of the file.
        endings: What the method's keys end in, such as `.lora_A.weight`.
        nested: The adapter wraps some layers twice (fused experts, attention): then
            `base_layer` before a factor belongs there.
    """
    keys = list(keys)
    grammar = _Grammar(endings)
    done: dict[str, list[tuple[str, str]]] = defaultdict(list)
    sound: dict[str, list[str]] = defaultdict(list)
    names: dict[str, str] = {}
    parallel = _data_parallel(keys)
    for key in keys:
        fixed = _apply(_unwrapped(key), key, done)
        if parallel:
            bare = fixed.replace("module.", "", 1)
            fixed = _apply((bare, "the data-parallel wrapper 'module' taken out"), fixed, done)
        for rule in (_one_prefix, grammar.factor_names):
            fixed = _apply(rule(fixed), fixed, done)
        named, name = grammar.without_name(fixed)
        if name or grammar.is_factor(fixed):
            names.setdefault(name, key)
        if name:
            fixed = _apply((named, f"the adapter's name {name!r} taken out"), fixed, done)
        fixed = _apply(grammar.with_weight(fixed), fixed, done)
        if not nested:
            fixed = _apply(grammar.without_base_layer(fixed), fixed, done)
        sound[fixed].append(key)
    problems = [
        Problem(
            f"{' and '.join(olds)} would all be {new}",
            "the file holds the same tensor more than once: keep one of them",
        )
        for new, olds in sound.items()
        if len(olds) > 1
    ]
    if len(names) > 1:
        called = ", ".join(repr(name) if name else "one without a name" for name in names)
        what = f"the file holds several adapters ({called}): {', '.join(names.values())} …"
        problems = [Problem(what, "keep the keys of one")]
    repairs = tuple(Repair(what, *hits[0], len(hits)) for what, hits in done.items())
    return Repaired({new: olds[0] for new, olds in sound.items()}, repairs, tuple(problems))


def _apply(
    change: tuple[str, str] | None, old: str, done: Mapping[str, list[tuple[str, str]]]
) -> str:
    """The changed key, noted under what was done to it."""
    if change is None or change[0] == old:
        return old
    new, what = change
    done[what].append((old, new))
    return new


def _unwrapped(key: str) -> tuple[str, str] | None:
    parts = key.split(".")
    found = [part for part in dict.fromkeys(parts) if part in _WRAPPERS]
    if not found:
        return None
    kept = [part for part in parts if part not in _WRAPPERS]
    reasons = [f"the {_WRAPPERS[part]} wrapper {part!r}" for part in found]
    return ".".join(kept), f"{' and '.join(reasons)} taken out"


def _data_parallel(keys: Sequence[str]) -> bool:
    """Whether every key begins with `module`, which else may be the name of a module."""
    rests = [re.sub(rf"^({re.escape(PREFIX)})+", "", _unwrapped_or_same(key)) for key in keys]
    of_modules = [rest for rest in rests if not rest.startswith(WHOLE)]
    return bool(of_modules) and all(rest.startswith("module.") for rest in of_modules)


def _unwrapped_or_same(key: str) -> str:
    return (_unwrapped(key) or (key, ""))[0]


def _one_prefix(key: str) -> tuple[str, str] | None:
    rest = key
    while rest.startswith(PREFIX):
        rest = rest.removeprefix(PREFIX)
    if key == PREFIX + rest:
        return None
    if key == rest:
        if key.startswith(WHOLE):
            return None
        return PREFIX + key, f"{PREFIX!r} put before"
    return PREFIX + rest, f"{PREFIX!r} kept once"


class _Grammar:
    """What the endings of a method say of a key: stem (`lora_A`), adapter name, tail (`weight`)."""

    def __init__(self, endings: Iterable[str]) -> None:
        self._endings = {ending.lstrip(".") for ending in endings}
        stems = {re.sub(r"\.(weight|bias)$", "", ending) for ending in self._endings}
        alternatives = "|".join(map(re.escape, sorted(stems, key=len, reverse=True)))
        self._factor = re.compile(rf"(?P<module>.*)\.(?P<stem>{alternatives})(?P<rest>(\.[^.]+)*)$")

    def is_factor(self, key: str) -> bool:
        """Whether the key is the method's own, with or without a name in it."""
        return self._factor.fullmatch(key) is not None

    def factor_names(self, key: str) -> tuple[str, str] | None:
        """`lora_down` and `lora_up`, where the method has `lora_A` and `lora_B`."""
        parts = key.split(".")
        new = [_TWINS.get(part, part) for part in parts]
        if new == parts or not any(e.startswith("lora_A") for e in self._endings):
            return None
        return ".".join(new), "lora_down and lora_up are lora_A and lora_B"

    def without_name(self, key: str) -> tuple[str, str]:
        """The key without the adapter's name, and that name, if there is one.

        PEFT has it in memory, between the factor and its tail, and takes it out when it saves.
        """
        saved = re.fullmatch(r"(.*\.)modules_to_save\.([^.]+)\.(?:\2\.)*(.+)", key)
        if saved:
            return saved[1] + saved[3], saved[2]
        found = self._factor.fullmatch(key)
        if not found:
            return key, ""
        *names, tail = found["rest"].split(".")[1:] or [""]
        if tail and f"{found['stem']}.{tail}" not in self._endings and tail != "weight":
            names, tail = [*names, tail], ""
        if not names or {"weight", "bias"} & set(names):
            return key, ""
        new = f"{found['module']}.{found['stem']}" + (f".{tail}" if tail else "")
        return new, names[0] if len(set(names)) == 1 else ".".join(names)

    def with_weight(self, key: str) -> tuple[str, str] | None:
        """`.weight` put back, or taken off, as the method's ending has it."""
        found = self._factor.fullmatch(key)
        if not found or found["stem"] + found["rest"] in self._endings:
            return None
        stem = f"{found['module']}.{found['stem']}"
        if not found["rest"] and f"{found['stem']}.weight" in self._endings:
            return f"{stem}.weight", "'.weight' put behind"
        if found["rest"] == ".weight" and found["stem"] in self._endings:
            return stem, "'.weight' taken off"
        return None

    def without_base_layer(self, key: str) -> tuple[str, str] | None:
        """`base_layer` between a plain layer and its factor."""
        found = self._factor.fullmatch(key)
        if not found or not found["module"].endswith(".base_layer"):
            return None
        module = re.sub(r"(\.base_layer)+$", "", found["module"])
        return f"{module}.{found['stem']}{found['rest']}", "'base_layer' before a factor taken out"
