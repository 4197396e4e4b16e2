"""What an extraction refuses before it reads a weight, of what would become of the tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.names import nearest
from weft.core.units import some

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.core.filters import Filter
    from weft.core.wishes import Wishes
    from weft.plan._views import View
    from weft.plan.extract import Change


def problems_of(
    changes: Sequence[Change], tuned: View, base: View, wishes: Wishes
) -> list[Problem]:
    """Every reason for which no adapter can be made of these changes."""
    kept = [change for change in changes if change.action != "leave"]
    return [
        *_filters(changes, base, wishes),
        *_without_a_place(kept, base),
        *_integers(kept, tuned, base),
        *_half_resized(changes, tuned, base),
    ]


def _filters(changes: Sequence[Change], base: View, wishes: Wishes) -> list[Problem]:
    """Filters that name nothing."""
    paths = [change.path for change in changes]
    parts = {part for path in paths for part in path.split(".") if not part.isdigit()}
    given: list[tuple[str, Filter]] = [
        *(("--target", each) for each in wishes.target or ()),
        *(("--save", each) for each in wishes.save),
        *(("--exclude", each) for each in wishes.exclude),
        *(("--rank", each) for each, _ in wishes.ranks),
    ]
    problems = []
    for option, each in given:
        if not any(each.matches(path) for path in paths) and each.text != "lm_head":
            near = nearest(each.text, parts, 1)
            meant = f", did you mean {near[0]!r}?" if near else ""
            problems.append(
                Problem(
                    f"{option} {each.text!r} names nothing in {base.name}{meant}",
                    "a filter is a part of a name, a glob (*norm*) or a /regex/",
                )
            )
    return problems


def _without_a_place(kept: Sequence[Change], base: View) -> list[Problem]:
    """New tensors that neither `weft merge` nor PEFT adds: only whole new modules can be saved."""
    paths = {change.path for change in kept}
    lost = [c for c in kept if c.new and not _is_of_a_new_module(c, paths, base)]
    if not lost:
        return []
    globs = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", change.path) for change in lost)
    names = lost[0].path if len(lost) == 1 else ",".join(globs)
    way = f"--exclude '{names}' leaves {'it' if len(lost) == 1 else 'them'} out"
    if all(change.name.endswith(".bias") for change in lost):
        way += "; or give BASE the biases as zeros, and they are saved as changed"
    what = some([change.name for change in lost], "tensor")
    why = "an adapter adds whole modules, and nothing to those that are there"
    return [Problem(f"{base.name} has no {what}: {why}", way)]


def _is_of_a_new_module(change: Change, paths: set[str], base: View) -> bool:
    """`weft merge` adds it: its weight is kept, and no module of the base is called the same."""
    module, _, parameter = change.path.rpartition(".")
    last = module.rpartition(".")[2]
    known = any(f".{last}." in f".{name}" for name in base.tensors)
    return parameter in ("weight", "bias") and f"{module}.weight" in paths and not known


def _integers(kept: Sequence[Change], tuned: View, base: View) -> list[Problem]:
    """Integers in place of weights; a counter or a buffer without columns is no weight."""
    found: dict[str, list[str]] = {}
    for change in kept:
        before = base.tensor(change.name)
        pair = [change.job, *([before] if before else [])]
        dtypes = {job.dtype: job for job in pair if "int" in job.dtype}
        is_weight = len(change.job.shape) > 1 or change.name.endswith(".weight")
        if not change.is_read or not dtypes or not (is_weight or len({j.dtype for j in pair}) > 1):
            continue
        view = tuned if "int" in change.job.dtype else base
        found.setdefault(f"{view.name} has integers ({min(dtypes)})", []).append(change.name)
    return [
        Problem(
            f"{what} in {some(names, 'tensor')}: are they quantised weights?",
            "give the 16-bit model that it was quantised from, or leave them out (--exclude)",
        )
        for what, names in found.items()
    ]


def _half_resized(changes: Sequence[Change], tuned: View, base: View) -> list[Problem]:
    """One table of the vocabulary with its new rows, and another as it was."""
    tables = [change for change in changes if change.rows_before is not None]
    left = [change for change in tables if change.action == "leave"]
    if not left or len(left) == len(tables):
        return []
    kept = next(change for change in tables if change.action != "leave")
    rows, before = kept.job.shape[0], kept.rows_before
    return [
        Problem(
            f"{left[0].name} is to stay as it is ({left[0].why}) and {kept.name} not, but the "
            f"vocabulary went from {before} rows in {base.name} to {rows} in {tuned.name}",
            f"keep both: let the filters take {left[0].path}, too (--embed save writes them in "
            "full); or leave both out: --embed skip",
        )
    ]
