"""Adapters whose initialisation moved the base: PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ.

They are trained on W − s · B₀ A₀, B₀ and A₀ being what the factors were at first. So the adapter as
it was before training, with a weight of −1 beside the trained one, gives W + s · (B A − B₀ A₀).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from weft.core.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.core.specs import Adapter, AdapterEntry

Weighted = tuple["Adapter", float]


def with_initial(
    adapters: Sequence[Weighted], initial: Adapter | None, *, base_is_residual: bool
) -> tuple[list[Weighted], list[Problem]]:
    """The adapters, and behind them the initial one, if there is something to take it off.

    LoftQ's base is W quantised, and B₀ A₀ the part of rank r of its error: only that base helps.

    Args:
        adapters: Each with its weight.
        initial: The adapter as it was before training.
        base_is_residual: The base is what the initialisation left: nothing is to be taken off.
    """
    moved = [(adapter, weight) for adapter, weight in adapters if adapter.moved_base and weight]
    if not moved:
        if initial is None and not base_is_residual:
            return list(adapters), []
        what = (
            "--init-adapter is given, and no adapter was initialised in a way that moves the base"
        )
        return list(adapters), [Problem(what, "leave it out")]
    if base_is_residual:
        return [_noted(*item, "base is the model that {name} left") for item in adapters], []
    if initial is None:
        return list(adapters), [_not_given(adapter) for adapter, _ in moved]
    problems = [p for adapter, _ in moved for p in _unlike(adapter, initial)]
    said = "what {name} took off the base is that of " + initial.given
    told = [_noted(*item, said) for item in adapters]
    factors = tuple(entry for entry in initial.entries if entry.kind == "lora")
    total = sum(weight for _, weight in moved)
    # Its notes and tokenizer are those of the trained one.
    plain = replace(
        initial, entries=factors, selection=None, base_model=None, notes=(), side_files=()
    )
    return [*told, (plain, -total)], problems


def _noted(adapter: Adapter, weight: float, text: str) -> Weighted:
    if not adapter.moved_base or not weight:
        return adapter, weight
    note = f"{adapter.given}: {text.format(name=adapter.moved_base)}"
    return replace(adapter, notes=(*adapter.notes, note)), weight


def _not_given(adapter: Adapter) -> Problem:
    name = adapter.moved_base
    residual = f"if BASE is the model that {name} left, say so with --init-adapter none"
    hint = f"give the adapter as it was before training, --init-adapter PATH; or, {residual}"
    if name == "LoftQ":
        hint = f"its base is a quantised one: {residual} (its weights, dequantised)"
    return Problem(
        f"{adapter.given} was initialised with {name}, which moved the base weights: its ΔW does "
        "not belong to the base that it names",
        f"{hint}; only `weft merge` has it, and a recipe takes what it wrote",
    )


def _unlike(adapter: Adapter, initial: Adapter) -> list[Problem]:
    """Why `initial` is not what `adapter` was before training."""
    if adapter.moved_base == "LoftQ":
        what = (
            f"{adapter.given} was initialised with LoftQ, whose base is W quantised: the initial "
            "adapter does not give it, being what rank r takes of the quantisation's error"
        )
        hint = "give the model that LoftQ left (its weights, dequantised), and --init-adapter none"
        return [Problem(what, hint)]
    mine, theirs = _factors(adapter), _factors(initial)
    problems = []
    if other := sorted({entry.kind for entry in mine.values()} - {"lora"}):
        what = f"{adapter.given} is {other[0]} on a base that {adapter.moved_base} moved"
        hint = "give the model that the initialisation left as BASE, and --init-adapter none"
        problems.append(Problem(what, hint))
    if lone := sorted(set(mine) ^ set(theirs)):
        owner, lacking = (adapter, initial) if lone[0] in mine else (initial, adapter)
        what = f"{owner.given} changes {lone[0]}, and {lacking.given} does not"
        problems.append(Problem(what, "the two are not of one training"))
    for target in mine.keys() & theirs.keys():
        one, other_one = mine[target], theirs[target]
        if _shapes(one) != _shapes(other_one) or one.scaling != other_one.scaling:
            what = (
                f"{target} has {_shapes(one)} and scaling {one.scaling:g} in {adapter.given}, "
                f"{_shapes(other_one)} and {other_one.scaling:g} in {initial.given}"
            )
            problems.append(Problem(what, "the two are not of one training"))
    return problems


def _factors(adapter: Adapter) -> dict[str, AdapterEntry]:
    return {e.target: e for e in adapter.entries if "A" in dict(e.tensors)}


def _shapes(entry: AdapterEntry) -> str:
    tensors = dict(entry.tensors)
    return f"A {list(tensors['A'].shape)}, B {list(tensors['B'].shape)}"
