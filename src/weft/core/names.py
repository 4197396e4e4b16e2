"""Tensor names: matching an adapter's module paths with a checkpoint's, and finding near misses."""

from __future__ import annotations

import difflib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Match:
    """How names of the adapter become names of the checkpoint.

    Attributes:
        names: Adapter name -> checkpoint name.
        unmatched: Adapter names without a counterpart.
        ambiguous: Adapter name -> all checkpoint names that end like it.
        edits: (prefix taken off, prefix put on) -> how many names needed it.
        moves: The same, with the names, for those of another release of the model's code.
    """

    names: dict[str, str]
    unmatched: tuple[str, ...]
    ambiguous: dict[str, tuple[str, ...]]
    edits: dict[tuple[str, str], int]
    moves: dict[tuple[str, str], list[str]]


# What releases of transformers have put before, and behind, and taken off again where a text model
# became a part of a larger one: `language_model.model.layers`, `model.language_model.layers`.
_MOVING = {"model", "language_model"}


def match(wanted: Iterable[str], present: Collection[str]) -> Match:
    """Find each of `wanted` in `present`: exactly, else by unique suffix.

    A checkpoint of the bare model lacks the prefix of the model with a head (`h.0…` for an adapter
    on `transformer.h.0…`), or carries one that the adapter's model did not have (`bert.`). The
    shorter name must be the whole end of the longer one, from a dot on. What is left is looked for
    without the parts in front that releases of vision-language models have moved.
    """
    names: dict[str, str] = {}
    by_suffix: dict[str, list[str]] | None = None
    unmatched: list[str] = []
    ambiguous: dict[str, tuple[str, ...]] = {}
    edits: dict[tuple[str, str], list[str]] = defaultdict(list)
    known = set(present)
    wanted = list(wanted)
    names.update((want, want) for want in wanted if want in known)
    # Where `model.layers.0…` is found as it stands, no prefix is missing: `mtp.lm_head` is another
    # module than `lm_head`. (Short names, such as `lm_head` itself, have no prefix in any case.)
    anchored = any(want.count(".") > 2 for want in names)
    for want in wanted:
        if want in names:
            continue
        if anchored:
            unmatched.append(want)
            continue
        if by_suffix is None:  # most adapters match exactly and never need it
            by_suffix = _index(present)
        longer = by_suffix.get(want, [])
        # A bare `weight` would match a tensor of that name anywhere: two parts at least.
        shorter = [s for s in _suffixes(want) if "." in s and s in known]
        candidates = [*longer, *shorter]
        if len(candidates) == 1:
            found = candidates[0]
            names[want] = found
            edits[edit(want, found)].append(want)
        elif candidates:
            ambiguous[want] = tuple(sorted(candidates))
        else:
            unmatched.append(want)
    moves = _moved(unmatched, present, names, ambiguous)
    unmatched = [want for want in unmatched if want not in names and want not in ambiguous]
    for change in [change for change in edits if _is_move(change, alone=len(edits) == 1)]:
        moves.setdefault(change, []).extend(edits.pop(change))
    counts = {change: len(wants) for change, wants in edits.items()}
    return Match(names, tuple(unmatched), ambiguous, counts, moves)


def _is_move(edit: tuple[str, str], *, alone: bool) -> bool:
    """Whether parts of a model moved: `model` alone is what a bare model lacks."""
    parts = {part for prefix in edit for part in prefix.split(".")} - {""}
    return parts <= _MOVING and (not alone or "language_model" in parts)


def _moved(
    wanted: Iterable[str],
    present: Iterable[str],
    names: dict[str, str],
    ambiguous: dict[str, tuple[str, ...]],
) -> dict[tuple[str, str], list[str]]:
    """Add what is found of `wanted` to `names` and `ambiguous`; -> the moves that it took."""
    moves: dict[tuple[str, str], list[str]] = defaultdict(list)
    wanted = list(wanted)
    cores: dict[str, list[str]] = defaultdict(list)
    for name in present if wanted else ():
        cores[_core(name)].append(name)
    for want in wanted:
        core = _core(want)
        candidates = cores.get(core, []) if "." in core else []
        if len(candidates) == 1:
            names[want] = candidates[0]
            moves[want.removesuffix(core), candidates[0].removesuffix(core)].append(want)
        elif candidates:
            ambiguous[want] = tuple(sorted(candidates))
    return dict(moves)


def _core(name: str) -> str:
    """`layers.0.mlp.up_proj.weight` for `language_model.model.layers.0.mlp.up_proj.weight`."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _MOVING:
        parts = parts[1:]
    return ".".join(parts)


def unflatten(flat: Iterable[str], modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Paths that lost their dots to underscores -> the paths that `modules` say they can be.

    Each is looked for as a whole module, else as the end of one, from a dot on. What is left may
    have something before it, the same for all, which then stays as it is.
    """
    whole: dict[str, set[str]] = defaultdict(set)
    ends: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        whole[_flat(module)].add(module)
        for suffix in _suffixes(module):
            ends[_flat(suffix)].add(suffix)
    found = {name: whole.get(name) or ends.get(name) or set() for name in flat}
    lost = [name for name, paths in found.items() if not paths]
    prefixes = {prefix for name in lost if (prefix := _foreign_prefix(name, whole))}
    for name in lost if len(prefixes) == 1 else ():
        (prefix,) = prefixes
        rest = whole.get(name.removeprefix(prefix), set()) if name.startswith(prefix) else set()
        found[name] = {f"{prefix[:-1]}.{module}" for module in rest}
    return {name: tuple(sorted(paths)) for name, paths in found.items()}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _foreign_prefix(name: str, whole: Mapping[str, set[str]]) -> str:
    """`x_` of `x_model_layers_0`, where there is a `model.layers.0`."""
    for place, letter in enumerate(name, 1):
        # A bare `proj` would be the end of many: two parts at least.
        if letter == "_" and any("." in module for module in whole.get(name[place:], ())):
            return name[:place]
    return ""


def edit(old: str, new: str) -> tuple[str, str]:
    """The prefixes to take off `old` and to put on in order to get `new`; one of them is empty."""
    if old.endswith(new):
        return old.removesuffix(new), ""
    return "", new.removesuffix(old)


def in_layer(name: str) -> bool:
    """Whether the tensor belongs to a module of a numbered layer."""
    return any(part.isdigit() for part in name.split(".")[:-2])


def nearest(name: str, present: Collection[str], count: int = 3) -> list[str]:
    """The names in `present` that look most like `name`, best first."""
    last = name.rsplit(".", 2)[-2:]
    # difflib is quadratic: among 10⁵ names, look only at those that end in one of the same parts.
    pool = [other for other in present if other.rsplit(".", 2)[-2:] == last]
    pool = pool or [other for other in present if other.rsplit(".", 1)[-1] == last[-1]]
    return difflib.get_close_matches(name, pool[:2000] or list(present)[:2000], count, 0.4)


def _index(present: Iterable[str]) -> dict[str, list[str]]:
    by_suffix: dict[str, list[str]] = defaultdict(list)
    for name in present:
        for suffix in _suffixes(name):
            by_suffix[suffix].append(name)
    return by_suffix


def _suffixes(name: str) -> Iterable[str]:
    """`b.c`, `c` for `a.b.c`: what is left after each dot."""
    while "." in name:
        name = name.partition(".")[2]
        yield name
