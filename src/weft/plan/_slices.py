"""The tensors of a recipe's output: their names, and the layer of the model that each is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.plan._stacks import Stack, comes_before, place

if TYPE_CHECKING:
    from weft.plan._fit import Fit
    from weft.plan._views import View
    from weft.recipes.records import ModelName, Module, Slice, Source

Views = Mapping["ModelName", "View"]
Belongs = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the output.

    Attributes:
        name: In the output.
        slice: Where the recipe says how it is made.
        inputs: Its name in every source of the slice.
        t: How far down the slice it is, from 0 to 1: where gradients are looked up.
        owner: A source that has it.
    """

    name: str
    slice: Slice
    inputs: tuple[str, ...]
    t: float
    owner: ModelName


def planned(
    module: Module, belongs: Belongs, views: Views, donor: View, fit: Fit, problems: list[Problem]
) -> Iterator[Planned]:
    """Every tensor of one module of the output."""
    if all(source.layers is None for each in module.slices for source in each.sources):
        for each in module.slices:
            yield from _whole(each, belongs, views, fit)
        return
    found = _ranges(module, belongs, views, problems)
    if found is None:
        return
    if not any(start < stop for each in module.slices for start, stop in map(_range, each.sources)):
        what = f"no layer is left: every layer_range is empty  @ {module.where}"
        problems.append(Problem(what, "an empty slice may stand beside others, for its head"))
        return
    yield from _outside(module.slices[0], belongs, views, before=True)
    number = 0
    for each in module.slices:
        lengths = [stop - start for start, stop in map(_range, each.sources)]
        for step in range(lengths[0]):
            # A slice of one layer is at its end, as in MergeKit.
            t = step / (lengths[0] - 1) if lengths[0] > 1 else 1.0
            yield from _layer(each, found, step, number, t, views)
            number += 1
    after = list(_outside(module.slices[-1], belongs, views, before=False))
    yield from after
    # An untied donor's config promises a head; that of a tied model is its embedding.
    for name in set() if donor.tie else donor.tensors:
        for source in module.slices[-1].sources:
            tie = views[source.model].tie
            if tie and tie.head == name and name not in {each.name for each in after}:
                last = module.slices[-1]
                yield Planned(name, last, (name,) * len(last.sources), 0.0, source.model)
                break


def sequence(module: Module) -> list[tuple[ModelName, int, str]] | None:
    """The model and the layer that each layer of the output is first made of, and the slice.

    None for all layers of whole models.
    """
    order = []
    for each in module.slices:
        first = each.sources[0]
        if first.layers is None:
            return None
        order += [(first.model, layer, each.where) for layer in range(*first.layers)]
    return order


def _range(source: Source) -> tuple[int, int]:
    assert source.layers is not None
    return source.layers


def _stacks(source: Source, belongs: Belongs, views: Views) -> list[Stack]:
    return [stack for stack in views[source.model].stacks if belongs(f"{stack.path}.0")]


def _whole(each: Slice, belongs: Belongs, views: Views, fit: Fit) -> Iterator[Planned]:
    """All layers of models that have equally many, and what is in none."""
    counts: dict[str, list[tuple[Source, int]]] = {}
    for source in each.sources:
        for stack in _stacks(source, belongs, views):
            counts.setdefault(stack.path, []).append((source, stack.count))
    # What is said of these is enough.
    odd = tuple(f"{path}." for path, found in counts.items() if not fit.layers(path, found))
    # Files of tensors alone have no layers to mergekit-pytorch, whatever their names look like.
    bare = not any(views[source.model].config for source in each.sources)
    stacks = [] if bare else _stacks(each.sources[0], belongs, views)
    owners: dict[str, ModelName] = {}
    for source in each.sources:
        for name in views[source.model].tensors:
            if belongs(name) and not name.startswith(odd):
                owners.setdefault(name, source.model)
    for name, owner in owners.items():
        where = place(name, stacks)
        t = 0.0
        if where.stack:
            t = where.layer / (where.stack.count - 1) if where.stack.count > 1 else 1.0
        yield Planned(name, each, (name,) * len(each.sources), t, owner)


def _ranges(
    module: Module, belongs: Belongs, views: Views, problems: list[Problem]
) -> dict[ModelName, Stack] | None:
    """The list of layers of every model, if each has one and all ranges lie in it."""
    found: dict[ModelName, Stack] = {}
    before = len(problems)
    for source in (source for each in module.slices for source in each.sources):
        stacks = _stacks(source, belongs, views)
        if len(stacks) != 1:
            names = ", ".join(stack.path for stack in stacks) or "none"
            problems.append(
                Problem(
                    f"slices need one list of layers, and {source.model} has {names}  "
                    f"@ {source.where}",
                    "name the part that is meant under `modules:`" if stacks else None,
                )
            )
            return None
        found[source.model] = stacks[0]
        start, stop = _range(source)
        if stop > stacks[0].count:
            problems.append(
                Problem(
                    f"layer_range [{start}, {stop}] reaches past the {stacks[0].count} layers of "
                    f"{source.model}  @ {source.where}.layer_range",
                    f"its last layer is {stacks[0].count - 1}: layer_range: "
                    f"[{start if start < stacks[0].count else 0}, {stacks[0].count}]",
                )
            )
    return found if len(problems) == before else None


def _layer(
    each: Slice, stacks: Mapping[ModelName, Stack], step: int, number: int, t: float, views: Views
) -> Iterator[Planned]:
    """The tensors of one layer of the output."""
    owners: dict[str, ModelName] = {}
    prefixes = []
    for source in each.sources:
        stack = stacks[source.model]
        prefix = f"{stack.path}.{_range(source)[0] + step}."
        prefixes.append(prefix)
        for name in views[source.model].tensors:
            if name.startswith(prefix):
                owners.setdefault(name.removeprefix(prefix), source.model)
    path = stacks[each.sources[0].model].path
    for rest, owner in owners.items():
        inputs = tuple(prefix + rest for prefix in prefixes)
        yield Planned(f"{path}.{number}.{rest}", each, inputs, t, owner)


def _outside(each: Slice, belongs: Belongs, views: Views, *, before: bool) -> Iterator[Planned]:
    """What is in no layer: embeddings before the first slice, norm and head after the last."""
    owners: dict[str, ModelName] = {}
    for source in each.sources:
        view = views[source.model]
        for name in view.tensors:
            outside = place(name, view.stacks).stack is None
            if outside and belongs(name) and comes_before(name) == before:
                owners.setdefault(name, source.model)
    for name, owner in owners.items():
        yield Planned(name, each, (name,) * len(each.sources), 0.0, owner)
