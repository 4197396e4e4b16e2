"""The rank of each module, when the singular values of all are known."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import TYPE_CHECKING

from weft.core.dtypes import itemsize
from weft.core.specs import job_bytes
from weft.decompose import ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weft.core.wishes import Wishes
    from weft.execute._decomposed import Spectrum
    from weft.plan.extract import Change


def first_ranks(changes: Sequence[Change], wishes: Wishes) -> dict[str, int]:
    """Name -> the rank to which it is decomposed, for those of which the rule says it before.

    Under a budget of bytes it is a guess: four times what each would get if all got the same.
    """
    asked = {change.name: change.rank for change in changes if change.rank is not None}
    rule = wishes.rule
    for change in changes:
        if change.name in asked or change.action != "decompose":
            continue
        if rule.kind == "rank":
            asked[change.name] = int(rule.value)
        elif rule.kind == "size":
            each = sum(cost(c, wishes) for c in changes if c.action == "decompose")
            asked[change.name] = min(change.form.full_rank, max(16, int(4 * rule.value / each)))
    return asked


def cost(change: Change, wishes: Wishes) -> int:
    """Bytes that a unit of rank takes; the factors of a tied table are written for both ends."""
    ends = 2 if change.head else 1
    return ends * change.form.numbers(1) * itemsize(wishes.dtype or "float32")


def saved_bytes(change: Change) -> int:
    """What the tensor takes in full."""
    return job_bytes(change.job) * (2 if change.head else 1)


def most_bytes(changes: Sequence[Change], wishes: Wishes) -> int:
    """On the disk at once, if all changes: factors in float32, and the file that is made of them.

    Where a rule decides of the ranks, the factors are left out.
    """
    asked = first_ranks(changes, wishes)
    total = 0
    for change in changes:
        rank = asked.get(change.name, 0)
        if change.action == "decompose":
            total += change.form.numbers(min(rank, change.form.full_rank)) * 4
            total += min(rank * cost(change, wishes), saved_bytes(change))
        elif change.action == "save":
            total += saved_bytes(change)
    return total


def final_ranks(
    changes: Sequence[Change],
    found: Mapping[str, Spectrum],
    wishes: Wishes,
    overhead: Callable[[Mapping[str, int]], int],
) -> dict[str, int] | None:
    """Name -> rank, 0 for a difference that is nothing but noise; None: the budget is too small.

    Args:
        changes: Those that were decomposed.
        found: Their factorisations.
        wishes: What was asked for.
        overhead: Bytes of the file that are no factors, given the ranks.
    """
    if wishes.rule.kind == "size":
        chosen = _under_budget(changes, found, wishes, overhead)
    else:
        chosen = {change.name: _rank(change, found[change.name], wishes) for change in changes}
    if chosen and wishes.uniform:
        most = max(chosen.values())
        if wishes.rule.kind == "rank":
            most = int(wishes.rule.value)
        chosen = {name: most if rank else 0 for name, rank in chosen.items()}
    return chosen


def _rank(change: Change, found: Spectrum, wishes: Wishes) -> int:
    rule = wishes.rule
    if change.rank is not None or rule.kind == "rank":
        return min(change.rank or int(rule.value), found.rank)
    matrices = range(change.form.count)
    if rule.kind == "auto":
        return max(found.signal(matrix).rank for matrix in matrices)
    each = [
        ranks.rank_for_energy(found.values[n].tolist(), float(found.energy[n]), rule.value)
        for n in matrices
    ]
    return max(found.rank if rank is None else rank for rank in each)


def _under_budget(
    changes: Sequence[Change],
    found: Mapping[str, Spectrum],
    wishes: Wishes,
    overhead: Callable[[Mapping[str, int]], int],
) -> dict[str, int] | None:
    """The ranks that keep most of ‖ΔW‖² in so many bytes; of one rank for all, the largest."""
    budget = int(wishes.rule.value)
    names = [change.name for change in changes]
    if budget < least_bytes(changes, found, wishes, overhead):
        return None
    budget -= _fixed(changes, found, overhead)
    if wishes.uniform:
        rank = budget // max(sum(cost(change, wishes) for change in changes), 1)
        rank = min(rank, max((each.rank for each in found.values()), default=0))
        return dict.fromkeys(names, rank)
    groups = _of_one_rank(changes)
    candidates = [_candidate(group, found, wishes) for group in groups]
    chosen = ranks.ranks_for_size(candidates, budget)
    assert chosen is not None
    return {c.name: rank for group, rank in zip(groups, chosen, strict=True) for c in group}


def least_bytes(
    changes: Sequence[Change],
    found: Mapping[str, Spectrum],
    wishes: Wishes,
    overhead: Callable[[Mapping[str, int]], int],
) -> int:
    """The smallest budget for which `final_ranks` (of whose arguments these are) has ranks.

    It holds what is no factor, and the ranks that were asked for by name; where there are none one
    unit of the cheapest, and of one rank for all a unit of each.
    """
    fixed = _fixed(changes, found, overhead)
    if wishes.uniform:
        return fixed + sum(cost(change, wishes) for change in changes)
    candidates = [_candidate(group, found, wishes) for group in _of_one_rank(changes)]
    asked = sum(min(each.least, len(each.values)) * each.cost for each in candidates)
    return fixed + (asked or min((each.cost for each in candidates), default=0))


def _fixed(
    changes: Sequence[Change],
    found: Mapping[str, Spectrum],
    overhead: Callable[[Mapping[str, int]], int],
) -> int:
    """Bytes of the file that are no factors, at most."""
    one = {change.name: 1 for change in changes}
    return max(overhead(one), overhead({name: found[name].rank for name in one}))


def _of_one_rank(changes: Sequence[Change]) -> list[list[Change]]:
    """What shares a rank: fused experts all together, as PEFT has them; else each its own."""
    experts = [change for change in changes if change.form.kind == "experts"]
    alone = [[change] for change in changes if change.form.kind != "experts"]
    return [*alone, experts] if experts else alone


def _candidate(
    group: Sequence[Change], found: Mapping[str, Spectrum], wishes: Wishes
) -> ranks.Candidate:
    """What each further unit of rank adds to all of a group, and takes."""
    each = [found[change.name].together() for change in group]
    values = [math.hypot(*units) for units in zip_longest(*each, fillvalue=0.0)]
    asked = group[0].rank  # of experts, that of all
    bytes_of_a_unit = sum(cost(change, wishes) for change in group)
    return ranks.Candidate(values[:asked], bytes_of_a_unit, asked or 0)
