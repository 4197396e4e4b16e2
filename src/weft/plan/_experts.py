"""LoRA on parameters, such as the experts of a layer: each entry gets the form of the base.

An adapter and a base may each hold the experts of a layer in one tensor, or one by one.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.core.specs import Repair
from weft.plan._converted import unconverted
from weft.plan._moe import ONE_EXPERT, PARTS, RENAMED, TRANSPOSED, TURNED_ON_DISK, Base
from weft.plan._stacked import fuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.core.specs import Adapter, AdapterEntry, Checkpoint, Param, Shape, TensorRef

# The order in which modules register them: PEFT wraps the first one innermost.
_ORDER = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a reading of an entry finds its tensors.

    Attributes:
        entry: The reading.
        fused: The tensor, if the base has it in one.
        parts: Else the name of each part and (expert -> tensor) for it.
        exchanged: Whether A holds the outputs and B the inputs, for every reading that fits.
    """

    entry: AdapterEntry
    fused: TensorRef | None
    parts: tuple[tuple[str, tuple[TensorRef, ...]], ...]
    exchanged: tuple[bool, ...]


def localise(
    base: Checkpoint, adapter: Adapter, layout: str | None
) -> tuple[Adapter, list[Problem]]:
    """The adapter with every entry in the form that the base has.

    Args:
        base: The base model.
        adapter: As it was read.
        layout: How `lora_B` of fused experts is laid out, whatever the adapter's config says.
    """
    if not any(
        e.alternatives or e.kind == "lora_experts" or ONE_EXPERT.match(e.module)
        for e in adapter.entries
    ):
        return adapter, []
    known = Base(base)
    adapter = _rename(adapter, known)
    notes, problems = list(adapter.notes), []
    entries: list[AdapterEntry] = []
    groups: dict[str, list[AdapterEntry]] = defaultdict(list)
    for entry in adapter.entries:
        if entry.kind == "lora_experts" or entry.alternatives:
            groups[entry.module].append(entry)
        else:
            entries.append(entry)
    stated = layout or adapter.config.get("lora_B_layout")
    grouped = stated == "grouped_by_expert"
    used = rescaled = False
    for module, several in groups.items():
        found = _assign(module, several, known, adapter)
        if isinstance(found, Problem):
            problems.append(found)
            continue
        for place in found:
            if place.entry.kind == "lora_experts":
                used = True
                as_trained = unconverted(place.entry, adapter, grouped=grouped)
                rescaled = rescaled or as_trained != place.entry
                place = replace(place, entry=as_trained)
            made = _form(place, known, adapter, grouped)
            if isinstance(made, Problem):
                problems.append(made)
            else:
                entries += made
    if used:
        notes.append(_layout_note(adapter, layout, stated))
    if split := sum(entry.kind == "lora_expert" for entry in entries):
        notes.append(
            f"{adapter.given}: the experts, fused as transformers 5 has them, are split into the "
            f"{split} matrices of the base"
        )
    if rescaled:
        notes.append(
            f"{adapter.given}: PEFT fused its gate_up_proj from single experts, which made the "
            "scaling of rsLoRA √2 too large; taken is what it was trained with"
        )
    whole, wrong = fuse(entries, known, adapter)
    repairs = (*adapter.repairs, *_fused(entries, whole))
    adapter = replace(adapter, entries=tuple(whole), notes=tuple(notes), repairs=repairs)
    return adapter, [*problems, *wrong]


def _fused(single: Sequence[AdapterEntry], whole: Sequence[AdapterEntry]) -> list[Repair]:
    """What is said of experts that the adapter has one by one, and the base in one tensor."""
    stacks = [entry for entry in whole if entry.kind == "lora_stacked"]
    if not stacks:
        return []
    gone = [entry for entry in single if entry not in whole]
    what = "the experts, one by one as transformers 4 has them, put into the one tensor of the base"
    return [Repair(what, gone[0].target, stacks[0].target, len(gone))]


def _layout_note(adapter: Adapter, layout: str | None, stated: str | None) -> str:
    why = "as asked for" if layout else "as its config says"
    if stated is None:
        why = "as PEFT writes it; Unsloth before September 2026 wrote grouped_by_expert"
    return f"{adapter.given}: lora_B of fused experts is read as {stated or 'rank_major'}, {why}"


def _rename(adapter: Adapter, known: Base) -> Adapter:
    """Module paths of transformers 5 in place of those on disk, or the other way round."""
    for one, other in itertools.chain.from_iterable(((a, b), (b, a)) for a, b in RENAMED):
        mine, theirs = f".{one}.", f".{other}."
        used = any(mine in f".{entry.target}" for entry in adapter.entries)
        there = [name for name in known.base.tensors if mine in f".{name}"]
        if used and not there and any(theirs in f".{name}" for name in known.base.tensors):
            entries = tuple(_renamed_entry(entry, mine, theirs) for entry in adapter.entries)
            note = f"{adapter.given}: {one!r} of the adapter's names is {other!r} in the base"
            return replace(adapter, entries=entries, notes=(*adapter.notes, note))
    return adapter


def _renamed_entry(entry: AdapterEntry, mine: str, theirs: str) -> AdapterEntry:
    module = f".{entry.module}.".replace(mine, theirs)[1:-1]
    others = tuple(_renamed_entry(other, mine, theirs) for other in entry.alternatives)
    return replace(entry, module=module, alternatives=others)


# ------------------------------------------------------------------------- which parameter is meant


def _assign(
    module: str, entries: Sequence[AdapterEntry], known: Base, adapter: Adapter
) -> list[_Place] | Problem:
    """One parameter for each set of factors of a module, by their shapes."""
    places = [_places(entry, known) for entry in entries]
    choices = [
        choice
        for choice in itertools.product(*places)
        if len({place.entry.parameter for place in choice}) == len(choice)
    ]
    if len(choices) > 1:
        ordered = [c for c in choices if _in_order([place.entry.parameter for place in c])]
        choices = ordered or choices
    if len(choices) == 1:
        return list(choices[0])
    file = entries[0].tensors[0][1].file
    factors = "; ".join(
        ", ".join(f"{ref.name} {list(ref.shape)}" for _, ref in entry.tensors) for entry in entries
    )
    if not choices:
        names = sorted({e.parameter for entry in entries for e in (entry, *entry.alternatives)})
        there = _there(module, names, known)
        return Problem(
            f"{factors} of {adapter.given} ({file}) fit none of {' or '.join(names)} of {module}: "
            f"{known.base.given} has {there}",
            f"is {known.base.given} the model that the adapter was trained on? It names "
            f"{adapter.base_model or 'none'} (weft inspect shows both)",
        )
    meant = " or ".join(
        " and ".join(place.entry.parameter for place in choice) for choice in choices[:4]
    )
    return Problem(
        f"{factors} of {adapter.given} ({file}) could be for {meant} of {module}",
        "name only those that were trained in target_parameters of adapter_config.json",
    )


def _in_order(names: Sequence[str]) -> bool:
    known = [_ORDER.index(name) for name in names if name in _ORDER]
    return len(known) == len(names) and known == sorted(known)


def _there(module: str, names: Sequence[str], known: Base) -> str:
    found = known.module(module)
    if found is None:
        return f"no {module}"
    inside = [f"{found}.{name}" for name in known.modules[found]]
    shown = [f"{n} {list(known.base.tensors[n].shape)}" for n in inside if n in known.base.tensors]
    if not shown:
        last = [n for n in known.base.tensors if n.startswith(f"{found}.0.")]
        shown = [f"{n} {list(known.base.tensors[n].shape)}" for n in last]
    return ", ".join(shown[:4]) or "nothing that weft knows there"


def _places(entry: AdapterEntry, known: Base) -> list[_Place]:
    found = []
    for reading in (replace(entry, alternatives=()), *entry.alternatives):
        module = known.module(reading.module)
        if module is None:
            continue
        tensor = known.base.tensors.get(f"{module}.{reading.parameter}")
        if reading.kind != "lora_experts":
            if tensor is not None and len(tensor.shape) != 3:
                found.append(_Place(reading, tensor, (), ()))
        elif tensor is not None:
            if fits := _fits(reading, tensor.shape):
                found.append(_Place(reading, tensor, (), fits))
        elif parts := _parts(module, reading, known):
            (rows, columns) = parts[0][1][0].shape
            count = dict(reading.params)["experts"]
            whole = (len(parts[0][1]), rows * len(parts), columns)
            if whole[0] == count and (fits := _fits(reading, whole)):
                found.append(_Place(reading, None, parts, fits))
    # A matrix that is a module's `weight` is an ordinary layer's, whatever else may be meant.
    plain = [place for place in found if place.entry.kind != "lora_experts"]
    return plain or found


def _fits(entry: AdapterEntry, weight: Shape) -> tuple[bool, ...]:
    """Whether A is for the inputs and B for the outputs of W (E, out, in), or exchanged."""
    shapes = {role: ref.shape for role, ref in entry.tensors}
    count = dict(entry.params)["experts"]
    experts, rows, columns = (1, *weight) if len(weight) == 2 else (*weight, 0, 0, 0)[:3]
    if experts != count or len(weight) not in (2, 3):
        return ()
    inner, outer = shapes["A"][1], shapes["B"][0]
    fits = [False] if (outer, inner) == (rows, columns) else []
    # A parameter that is a matrix has never been taken the other way round.
    return (*fits, *([True] if (inner, outer) == (rows, columns) and len(weight) == 3 else []))


def _parts(
    module: str, entry: AdapterEntry, known: Base
) -> tuple[tuple[str, tuple[TensorRef, ...]], ...]:
    """The matrices of the experts one by one, for a parameter that the base does not have."""
    numbers = sorted(int(n) for n in known.modules[module] if re.fullmatch("0|[1-9][0-9]*", n))
    if numbers != list(range(len(numbers))) or not numbers:
        return ()
    for names in PARTS.get(entry.parameter, ()):
        found = tuple(
            (name, tuple(known.base.tensors.get(f"{module}.{n}.{name}.weight") for n in numbers))
            for name in names
        )
        refs = [ref for _, several in found for ref in several]
        matrices = all(ref is not None and len(ref.shape) == 2 for ref in refs)
        if matrices and len({ref.shape for ref in refs if ref}) == 1:
            return found  # type: ignore[return-value]
    return ()


# ------------------------------------------------------------------------ what the base's form is


def _form(
    place: _Place, known: Base, adapter: Adapter, grouped: bool
) -> list[AdapterEntry] | Problem:
    entry = place.entry
    if entry.kind != "lora_experts":
        return [entry]
    if place.fused is not None and len(place.fused.shape) == 2:
        params: tuple[tuple[str, Param], ...] = (("transposed", False),)
        return [replace(entry, kind="lora", params=params)]
    exchanged = place.exchanged[0]
    if len(place.exchanged) > 1:
        decided = _square_is_exchanged(place, known, adapter)
        if isinstance(decided, Problem):
            return decided
        exchanged = decided
    experts = dict(entry.params)["experts"]
    params = (("exchanged", exchanged), ("experts", experts), ("grouped", grouped))
    if place.fused is not None:
        return [replace(entry, params=params)]
    return _split(place, params, exchanged)


def _split(
    place: _Place, params: tuple[tuple[str, Param], ...], exchanged: bool
) -> list[AdapterEntry]:
    """An entry for every expert and part: its rows of A, and all of B, of which it takes a part."""
    entry = place.entry
    tensors = dict(entry.tensors)
    A, B = tensors["A"], tensors["B"]
    made = []
    for n, (name, experts) in enumerate(place.parts):
        for expert, weight in enumerate(experts):
            rank = A.shape[0] // len(experts)
            size = A.nbytes // len(experts)
            start = A.start + expert * size
            own = replace(A, shape=(rank, A.shape[1]), start=start, stop=start + size)
            first = n * weight.shape[0]
            made.append(
                replace(
                    entry,
                    module=f"{entry.module}.{expert}.{name}",
                    parameter="weight",
                    kind="lora_expert",
                    tensors=(("A", own), ("B", B)),
                    params=(*params, ("expert", expert), ("first", first)),
                )
            )
    return made


def _square_is_exchanged(place: _Place, known: Base, adapter: Adapter) -> bool | Problem:
    """A square weight fits both ways: then it depends on the release of PEFT that trained it.

    0.17 and 0.18 took every parameter as (E, in, out). 0.19.0 asked the model whether it is, and
    took the answer the wrong way round; later ones take it right.
    """
    types = known.model_types()
    transposed = bool(types & TRANSPOSED)
    version = release_of(adapter.config.get("peft_version"))
    entry = place.entry
    if not types & TURNED_ON_DISK:
        if version is not None and version < (0, 19):
            return True
        if version is not None and types:
            return transposed if version > (0, 19, 0) else not transposed
        if transposed:
            return True  # by every release but 0.19.0
    return Problem(
        f"{entry.module}.{entry.parameter} is square, so that {adapter.given} could "
        "mean s · B @ A (PEFT from 0.19.1 on) or s · (B @ A)ᵀ (PEFT 0.17 and 0.18) for each expert",
        "write the release of PEFT that trained it into adapter_config.json as peft_version, and "
        "give a base whose config.json has a model_type",
    )


def release_of(text: object) -> tuple[int, ...] | None:
    """`peft_version` as numbers; None where it is missing or has none."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text) if isinstance(text, str) else None
    return tuple(int(n or 0) for n in found.groups()) if found else None
