"""Adapters of single experts, on a base that has all experts of a layer in one tensor."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.plan._moe import FUSED, INTERLEAVED, ONE_EXPERT, PARTS, TRANSPOSED, TURNED_ON_DISK, Base

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.core.specs import Adapter, AdapterEntry, Param, Shape, TensorRef


def fuse(
    entries: Sequence[AdapterEntry], known: Base, adapter: Adapter
) -> tuple[list[AdapterEntry], list[Problem]]:
    """Entries of single experts that the base has in one tensor become one entry for that."""
    kept: list[AdapterEntry] = []
    groups: dict[tuple[str, str], list[tuple[int, int, AdapterEntry]]] = defaultdict(list)
    for entry in entries:
        one = ONE_EXPERT.match(entry.module)
        fused = _fused_tensor(one.group(1), FUSED[one.group(3)][0], known) if one else None
        if one is None or fused is None or known.module(entry.module) is not None:
            kept.append(entry)
            continue
        parameter, part = FUSED[one.group(3)]
        groups[one.group(1), parameter].append((int(one.group(2)), part, entry))
    problems = []
    for (module, parameter), members in groups.items():
        weight = _fused_tensor(module, parameter, known)
        assert weight is not None
        made = _stack(module, parameter, members, weight, known, adapter)
        if isinstance(made, Problem):
            problems.append(made)
        else:
            kept.append(made)
    return kept, problems


def _fused_tensor(module: str, parameter: str, known: Base) -> TensorRef | None:
    found = known.module(module)
    ref = known.base.tensors.get(f"{found}.{parameter}") if found else None
    return ref if ref is not None and len(ref.shape) == 3 else None


def _stack(
    module: str,
    parameter: str,
    members: Sequence[tuple[int, int, AdapterEntry]],
    weight: TensorRef,
    known: Base,
    adapter: Adapter,
) -> AdapterEntry | Problem:
    """One entry for W (E, d1, d2), of the factors of single experts and parts."""
    first = members[0][2]
    ref = first.tensors[0][1]
    where = f"{ref.name} of {adapter.given} ({ref.file}) and {len(members) - 1} more like it"
    if any(entry.kind != "lora" for _, _, entry in members):
        return Problem(
            f"{where} are for single experts, and {known.base.given} has {weight.name} in one; of "
            f"{first.kind} weft splits no experts",
            "give the base in the layout before transformers 5 (save_original_format=True)",
        )
    types = known.model_types()
    parts = len(PARTS[parameter][0])
    if parts > 1 and types & INTERLEAVED:
        return Problem(
            f"{where} are for single experts, and {weight.name} of {known.base.given} has their "
            "rows interleaved",
            "train with target_parameters on this model",
        )
    fits = [_fits_stacked(entry, weight.shape, parts) for _, _, entry in members]
    both = set.intersection(*map(set, fits))
    if len(both) > 1:
        both = {bool(types & (TRANSPOSED | TURNED_ON_DISK))} if types else both
    beyond = [expert for expert, _, _ in members if expert >= weight.shape[0]]
    if len(both) != 1 or beyond:
        shapes = ", ".join(f"{role} {list(ref.shape)}" for role, ref in first.tensors)
        return Problem(
            f"{where} ({shapes}) do not fit {weight.name}, {list(weight.shape)} in the base",
            f"the adapter names {adapter.base_model or 'no model'} as its base: is this that one?",
        )
    scalings = {entry.scaling for _, _, entry in members}
    params: dict[str, Param] = {
        "exchanged": both.pop(),
        "parts": parts,
        "places": tuple(n for expert, part, _ in members for n in (expert, part)),
    }
    if len(scalings) > 1:
        params["scalings"] = tuple(entry.scaling for _, _, entry in members)
    return replace(
        first,
        module=module,
        parameter=parameter,
        kind="lora_stacked",
        tensors=tuple(
            (f"{role}.{n}", ref)
            for n, (_, _, entry) in enumerate(members)
            for role, ref in entry.tensors
        ),
        scaling=1.0 if len(scalings) > 1 else scalings.pop(),
        params=tuple(sorted(params.items())),
    )


def _fits_stacked(entry: AdapterEntry, weight: Shape, parts: int) -> list[bool]:
    """Whether W is (E, parts · out, in), or (E, in, parts · out)."""
    shapes = {role: ref.shape for role, ref in entry.tensors}
    inner, outer = shapes["A"][1], shapes["B"][0] * parts
    return [
        exchanged
        for exchanged, expected in ((False, (outer, inner)), (True, (inner, outer)))
        if weight[1:] == expected
    ]
