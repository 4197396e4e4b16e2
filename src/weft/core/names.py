"""Tensor names: matching an adapter's module paths with a checkpoint's, and finding near misses."""

from __future__ import annotations

import difflib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


@dataclass(frozen=True, slots=True)
class Match:
    """How names of the adapter become names of the checkpoint.

    Attributes:
        names: Adapter name -> checkpoint name.
        unmatched: Adapter names without a counterpart.
        ambiguous: Adapter name -> all checkpoint names that end like it.
        edits: (prefix taken off, prefix put on) -> how many names needed it.
    """

    names: dict[str, str]
    unmatched: tuple[str, ...]
    ambiguous: dict[str, tuple[str, ...]]
    edits: dict[tuple[str, str], int]


def match(wanted: Iterable[str], present: Collection[str]) -> Match:
    """Find each of `wanted` in `present`: exactly, else by unique suffix.

    A checkpoint of the bare model lacks the prefix of the model with a head (`h.0…` for an adapter
    on `transformer.h.0…`), or carries one that the adapter's model did not have (`bert.`). The
    shorter name must be the whole end of the longer one, from a dot on.
    """
    names: dict[str, str] = {}
    by_suffix: dict[str, list[str]] | None = None
    unmatched: list[str] = []
    ambiguous: dict[str, tuple[str, ...]] = {}
    edits: dict[tuple[str, str], int] = defaultdict(int)
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
            edits[edit(want, found)] += 1
        elif candidates:
            ambiguous[want] = tuple(sorted(candidates))
        else:
            unmatched.append(want)
    return Match(names, tuple(unmatched), ambiguous, dict(edits))


def edit(old: str, new: str) -> tuple[str, str]:
    """The prefixes to take off `old` and to put on in order to get `new`; one of them is empty."""
    if old.endswith(new):
        return old.removesuffix(new), ""
    return "", new.removesuffix(old)


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
