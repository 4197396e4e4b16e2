"""Which tensor of the base each entry of an adapter changes, and whether its shapes fit there."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from weft import deltas
from weft.core.dtypes import WEIGHTS
from weft.core.errors import Problem
from weft.core.names import Match, match, nearest
from weft.core.specs import Adapter, AdapterEntry, Checkpoint, Delta, Repair, Shape, TensorRef
from weft.formats.checkpoint import same_values
from weft.plan._coverage import doubts
from weft.plan._in_memory import in_memory
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weft.core.specs import Param

# The architectures whose blocks are made of transformers' Conv1D, which stores (in, out).
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}


@dataclass(slots=True)
class Change:
    """Everything that happens to one tensor.

    Attributes:
        base: A tensor of an adapter that takes the place of the base's (a resized embedding).
        owner: The number of the adapter that brings `base`.
        deltas: What is added, with the number of the adapter that adds it.
    """

    base: TensorRef | None = None
    owner: int | None = None
    deltas: list[tuple[int, Delta]] = field(default_factory=list)


@dataclass(slots=True)
class Targets:
    """What the adapters do to the base, tensor by tensor, and what is wrong with it."""

    changes: dict[str, Change] = field(default_factory=dict)
    added: dict[str, TensorRef] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    near: dict[str, list[str]] = field(default_factory=dict)

    def change(self, name: str) -> Change:
        return self.changes.setdefault(name, Change())


def collect(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    head: str | None,
    embedding: str | None,
) -> Targets:
    """Place every entry of every adapter.

    Args:
        base: The base model.
        adapters: Each with its weight.
        head: Name of the output embedding of a tied model, which may be absent from the files.
        embedding: Name of the tensor that a tied model has in its place.
    """
    targets = Targets()
    placed: list[_Placed] = []
    for number, (adapter, weight) in enumerate(adapters):
        names = _match(base, adapter, head, targets)
        targets.warnings += doubts(base, adapter, names) if weight else []
        for entry in adapter.entries if weight else ():
            name = names.get(entry.target)
            if name is None:
                continue
            present = base.tensors.get(name)
            if present is None and name == head:
                # The head of a tied model may be absent: its weight is the embedding's.
                present = base.tensors[embedding or name]
            if present is None:
                _add_new(name, entry, weight, adapter, targets)
            else:
                placed.append(_Placed(number, adapter, weight, entry, name, present))
    # What adapters bring as the base of a layer comes first: all deltas must fit that one.
    rest = [item for item in placed if not _brings_base(item, base, targets)]
    for item in rest:
        _place(item, base, targets)
    _look_across(targets, {item.name: item.present for item in placed})
    return targets


def _look_across(targets: Targets, present: Mapping[str, TensorRef]) -> None:
    """Tell deltas of the other tensors that their adapter changes, where their kind asks."""
    peers: dict[tuple[int, str], list[tuple[Delta, TensorRef]]] = defaultdict(list)
    for name, change in targets.changes.items():
        for owner, delta in change.deltas:
            peers[owner, delta.kind].append((delta, change.base or present[name]))
    told = {key: deltas.across(key[1], changed) for key, changed in peers.items()}
    for change in targets.changes.values():
        change.deltas = [
            (owner, _with_params(delta, told[owner, delta.kind])) for owner, delta in change.deltas
        ]


def _with_params(delta: Delta, params: Mapping[str, Param]) -> Delta:
    return replace(delta, params=tuple(sorted({**dict(delta.params), **params}.items())))


@dataclass(frozen=True, slots=True)
class _Placed:
    """One entry, and the tensor of the base that it changes."""

    number: int
    adapter: Adapter
    weight: float
    entry: AdapterEntry
    name: str
    present: TensorRef


def _match(
    base: Checkpoint, adapter: Adapter, head: str | None, targets: Targets
) -> dict[str, str]:
    """Adapter target -> tensor name of the output; what does not land is a problem."""
    present = set(base.tensors) | ({head} if head else set())
    needed = [entry for entry in adapter.entries if not entry.optional]
    wanted = list(dict.fromkeys(entry.target for entry in needed))
    found = match(wanted, present)
    if len(found.edits) > 1:
        edits = "; ".join(f"{_edit(edit)} ({count})" for edit, count in found.edits.items())
        targets.problems.append(
            Problem(
                f"{adapter.given} fits {base.given} only with several renamings at once: {edits}",
                "the adapter belongs to another model, or its keys were edited by hand",
            )
        )
    for edit, count in found.edits.items():
        targets.notes.append(f"{adapter.given}: {_edit(edit)} to match the base ({count} tensors)")
    what = f"{adapter.given} names modules as another release of the model's code did"
    for moved in found.moves.values():
        old, new = moved[0], found.names[moved[0]]
        if all(in_memory(found.names[name], base.config) == name for name in moved):
            targets.notes.append(
                f"{adapter.given}: {old} is {new} in the base's files ({len(moved)} tensors)"
            )
        else:
            targets.repairs.append(Repair(what, old, new, len(moved)))
    for want, several in found.ambiguous.items():
        targets.problems.append(
            Problem(
                f"{want} of {adapter.given} could be {' or '.join(several[:4])} in {base.given}"
            )
        )
    entries = {entry.target: entry for entry in adapter.entries}
    names = dict(found.names)
    for want in found.unmatched:
        entry = entries[want]
        if entry.saved_as and _is_new_module(entry.saved_as, base):
            names[want] = _renamed(want, found)
        else:
            targets.problems.append(_unmatched(want, entry, base, adapter, targets))
    for entry in adapter.entries:
        weight = names.get(replace(entry, parameter="weight").target)
        if entry.optional and weight:
            beside = weight.removesuffix("weight") + entry.parameter
            if beside in base.tensors:
                names[entry.target] = beside
    return names


def _edit(edit: tuple[str, str]) -> str:
    off, on = edit
    return f"{off!r} taken off the adapter's names" if off else f"{on!r} put before its names"


def _renamed(name: str, found: Match) -> str:
    for off, on in found.edits:
        name = name.removeprefix(off) if off else on + name
    return name


def _is_new_module(module: str, base: Checkpoint) -> bool:
    """No tensor of the base belongs to a module of that name, under any prefix."""
    last = module.rpartition(".")[2]
    return not any(f".{last}." in f".{name}" for name in base.tensors)


def _unmatched(
    want: str, entry: AdapterEntry, base: Checkpoint, adapter: Adapter, targets: Targets
) -> Problem:
    ref = entry.tensors[0][1]
    where = f"{ref.name} of {adapter.given} ({ref.file})"
    siblings = [name for name in base.tensors if name.startswith(entry.module + ".")]
    if entry.parameter == "bias" and f"{entry.module}.weight" in siblings:
        return Problem(f"{where} is a bias for {entry.module}, which has none in {base.given}")
    if any(name.endswith(".in_proj_weight") for name in siblings):
        return Problem(
            f"{where} is LoRA on nn.MultiheadAttention, and that on its out_proj is missing",
            "the file lost tensors: save or download the adapter again",
        )
    pattern = re.sub(r"\d+", "*", want)  # the same question for every layer
    near = targets.near[pattern] = targets.near.get(pattern) or nearest(want, base.tensors)
    close = f"; nearest: {', '.join(near)}" if near else ""
    return Problem(
        f"{where} changes {want}, which {base.given} does not have{close}",
        f"is {base.given} the model that the adapter was trained on? It names "
        f"{adapter.base_model or 'none'} (weft inspect shows both)",
    )


def _add_new(
    name: str, entry: AdapterEntry, weight: float, adapter: Adapter, targets: Targets
) -> None:
    (_, ref), *_ = entry.tensors
    if weight == 0:
        return
    if weight != 1 or name in targets.added:
        targets.problems.append(
            Problem(f"{ref.name} of {adapter.given} is new to the base: it can only have weight 1")
        )
        return
    targets.added[name] = ref
    targets.notes.append(f"{name} is new: {adapter.given} saves it and the base has none")


def _brings_base(item: _Placed, base: Checkpoint, targets: Targets) -> bool:
    """Whether the entry is a weight that takes the base's place; if so, it does so now."""
    value = dict(item.entry.tensors).get("value")
    present, name, given = item.present, item.name, item.adapter.given
    if value is None:
        return False
    own = bool(dict(item.entry.params).get("own_base"))
    grows = value.shape != present.shape and _grows(value.shape, present, base, own)
    whole = item.weight == 1 and value.shape == present.shape and value.dtype == present.dtype
    # Integers (a counter of BatchNorm) are replaced as they are; nothing is added to them.
    if not (own or grows or (whole and present.dtype not in WEIGHTS)):
        return False
    change = targets.change(name)
    if change.owner == item.number and not own:
        return False  # saved beside its resized original: an ordinary replacement of that
    if value.shape != present.shape and not grows:
        targets.problems.append(_misfit(item.entry, name, present.shape, item.adapter))
    elif same_values(value, change.base or present):
        pass  # PEFT saves the base's embedding along, as it was
    elif item.weight != 1 or change.base is not None:
        what = "resizes" if grows else "has its own base for"
        fact = f"{given} {what} {name}: only one adapter may, and with weight 1"
        targets.problems.append(Problem(fact))
    else:
        change.base, change.owner = value, item.number
        sizes = f"{list(present.shape)} to {list(value.shape)}"
        targets.notes.append(
            f"{name} goes from {sizes}, as {given} saved it"
            if grows
            else f"{name}: {given} brings a weight of its own, which takes the base's place"
        )
    return True


def _place(item: _Placed, base: Checkpoint, targets: Targets) -> None:
    """Check one delta against the tensor that it changes, and add it to the changes."""
    entry, name, adapter = item.entry, item.name, item.adapter
    change = targets.change(name)
    if item.present.dtype not in WEIGHTS:
        targets.problems.append(
            Problem(
                f"{name} of {base.given} is {item.present.dtype}, and ΔW cannot be added to that",
                "merge into the 16-bit model that it was quantised from",
            )
        )
        return
    tensors = entry.tensors
    if entry.reads:
        if (other := _beside(item, base)) is None:
            fact = f"{base.given} has {name} without the {entry.reads} that its change depends on"
            targets.problems.append(Problem(fact))
            return
        tensors = (*tensors, (entry.reads, other))
    shapes = {role: ref.shape for role, ref in tensors}
    params = dict(entry.params)
    shape = change.base.shape if change.base else item.present.shape
    kind = deltas.kind(entry.kind)
    if hasattr(kind, "refusal") and (reason := kind.refusal(shapes, params, shape)):
        ref = entry.tensors[0][1]
        targets.problems.append(Problem(f"{ref.name} in {ref.file} changes {name}: {reason}"))
        return
    fits = kind.orientations(shapes, params, shape)
    if not fits:
        targets.problems.append(_misfit(entry, name, shape, adapter))
        return
    if len(fits) > 1:
        fits = (_square_is_transposed(entry.module, name, base, adapter),)
    if fits[0]:
        params["transposed"] = True
    if any(owner == item.number and other.kind == entry.kind for owner, other in change.deltas):
        first = entry.tensors[0][1].name
        targets.problems.append(
            Problem(f"two tensors of {adapter.given} change {name}: {first} is one")
        )
        return
    delta = Delta(entry.kind, tensors, entry.scaling, item.weight, tuple(sorted(params.items())))
    change.deltas.append((item.number, delta))


def _beside(item: _Placed, base: Checkpoint) -> TensorRef | None:
    """The parameter that the entry reads, of the module that it changes."""
    module = item.name.removesuffix(item.entry.parameter)
    return base.tensors.get(f"{module}{item.entry.reads}")


def _grows(value: Shape, present: TensorRef, base: Checkpoint, own: bool) -> bool:
    """A tensor with one row per token, saved after the vocabulary was resized."""
    rows = config_value(base.config, "vocab_size")
    same = len(value) > 0 and value[1:] == present.shape[1:]
    return same and (own or rows == present.shape[0])


def _misfit(entry: AdapterEntry, name: str, shape: Shape, adapter: Adapter) -> Problem:
    parts = ", ".join(f"{ref.name} {list(ref.shape)}" for _, ref in entry.tensors)
    file = entry.tensors[0][1].file
    return Problem(
        f"{name} is {list(shape)} in the base, and {parts} in {file} do not fit it",
        f"the adapter names {adapter.base_model or 'no model'} as its base: is this that one, "
        "in the same size?",
    )


def _square_is_transposed(module: str, name: str, base: Checkpoint, adapter: Adapter) -> bool:
    """A square matrix fits both ways: the architecture decides, since PEFT's flag does not.

    (`fan_in_fan_out` in the config is that of the module which happened to be adapted last.)
    """
    leaf = module.rpartition(".")[2]
    if leaf in CONV1D_MODULES:
        # A sibling that is not square shows how this model stores them, whatever it is called.
        block = name.rsplit(f".{leaf}.", 1)[0].rpartition(".")[0]
        for other, ref in base.tensors.items():
            if other.startswith(block) and other.endswith((".c_attn.weight", ".c_fc.weight")):
                rows, columns = (*ref.shape, 0)[:2]
                if rows != columns:
                    return columns > rows
    parts = [base.config, *(part for part in base.config.values() if isinstance(part, dict))]
    types = {part.get("model_type") for part in parts} - {None}
    if types:
        return bool(types & CONV1D_MODELS) and leaf in CONV1D_MODULES
    return bool(adapter.config.get("fan_in_fan_out"))
