"""`weft diff`: which tensors of two checkpoints differ, and by how much."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from weft.api._execution import check_place
from weft.api._models import Models, named
from weft.core import events
from weft.core.differences import Diff, TensorDifference
from weft.core.errors import FormatError
from weft.core.filters import names_filter
from weft.formats.identity import identify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.execute._difference import Sums
    from weft.plan._views import View
    from weft.plan.pairs import Pair
    from weft.recipes.records import ModelName


def diff(
    a: str | Path,
    b: str | Path,
    *,
    filter: str | None = None,
    ranks: bool = False,
    threads: int | None = None,
    cache_dir: str | None = None,
    on_event: events.OnEvent = events.ignore,
) -> Diff:
    """Compare two models, tensor by tensor, in one pass over both.

    Args:
        a: Folder, file or `org/name@revision`, with adapters if need be: `base+adapter:0.7`. What
            adapters change is compared as `merge` would write it.
        b: The same; differences are relative to it.
        filter: Compare only tensors of these names: parts of names, globs or `/regex/`, in a comma
            list.
        ranks: Take the stable rank of every matrix that differs, too: a few passes more.
        threads: None takes what affinity and cgroup allow.
        cache_dir: The hub's cache, in place of HF_HOME's.
        on_event: Called with progress, from several threads.

    Raises:
        WeftError: See `weft.core.errors`.
    """
    from weft.execute.compare import compare
    from weft.plan.pairs import pairs

    begin = time.perf_counter()
    count = check_place("cpu", threads)
    wanted = names_filter(filter) if filter is not None else lambda _name: True
    opened = Models(cache_dir, dequantise=True)
    names = named(str(a)), named(str(b))
    views = opened.view(names[0]), opened.view(names[1])
    warnings = opened.examine()
    warnings += [said for view in views if len(view.given) > 1 for said in view.plan.warnings]
    found, notes = pairs(*views, wanted)
    said = dict.fromkeys(note for v in views if len(v.given) == 1 for note in v.plan.notes)
    both = [pair for pair in found if pair.comparable]
    sums = compare([pair.jobs for pair in both], threads=count, ranks=ranks, on_event=on_event)
    _check_unchanged(views)
    results = {pair.name: each for pair, each in zip(both, sums, strict=True)}
    relation = _relation(opened, *names)
    return Diff(
        str(a),
        str(b),
        tuple(_record(pair, *results.get(pair.name, (None, None))) for pair in found),
        time.perf_counter() - begin,
        (*notes, *said, *((relation,) if relation else ())),
        tuple(warnings),
        merged=relation is not None and filter is None,  # of some tensors nothing follows
    )


def _record(pair: Pair, sums: Sums | None, rank: float | None) -> TensorDifference:
    shapes = (pair.a.shape if pair.a else None, pair.b.shape if pair.b else None)
    dtypes = (pair.a.dtype if pair.a else None, pair.b.dtype if pair.b else None)
    found = TensorDifference(pair.name, pair.type, pair.stack, pair.layer, shapes, dtypes)
    if sums is None or not sums.changed:
        return found
    return replace(
        found,
        changed=sums.changed,
        difference=math.sqrt(sums.difference),
        base=math.sqrt(sums.base),
        largest=sums.largest,
        not_finite=sums.not_finite,
        rounds=dtypes[0] != dtypes[1] and not sums.unrounded,
        rank=rank,
    )


def _relation(opened: Models, a: ModelName, b: ModelName) -> str | None:
    """A line, if weft merged one of the two from the other: its manifest names it."""
    from weft.write.manifest import origin

    if a.adapters or b.adapters:
        return None
    for one, other in ((a, b), (b, a)):
        made, base = (opened.opened(name) for name in (one, other))
        found = origin(made) if made else None
        if made and base and found and Path(found.base) == Path(base.folder):
            adapters = " + ".join(Path(adapter).name for adapter in found.adapters)
            by = f" and {adapters}" if adapters else ""
            return f"weft {found.version} merged {made.given} from {base.given}{by}"
    return None


def _check_unchanged(views: Sequence[View]) -> None:
    for entry in (entry for view in views for entry in view.plan.inputs):
        path = Path(entry.path)
        if not path.exists() or identify(path) != entry.identity:
            raise FormatError(
                f"{entry.path} changed while it was being read", "run the same command again"
            )
