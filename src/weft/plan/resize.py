"""Which factors of an adapter share a rank, and what its config says when they have another one.

From headers and the config alone. An adapter that is more than products of two factors, or whose
product means something only beside its base, is refused by name.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.core.errors import PlanError, Problem, Unsupported
from weft.core.units import clean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.specs import Adapter, AdapterEntry, TensorRef

_COPIED = {"replace", "trainable_tokens", "lora_bias"}
_MERGE_IT = "weft merge keeps all of it; what is merged can be extracted again"
# kind -> why two smaller factors would not do the same
_REFUSED = {
    "dora": "DoRA: its magnitude was trained with this very direction, and ‖W + ΔW‖ of the base, "
    "which divides it, is not in the adapter",
    "kasa": "KaSA: it changes the base's own singular values, too",
    "qalora": "QA-LoRA: its factors act on means of groups of inputs",
    "bdlora": "BD-LoRA: a factor of blocks would not stay one",
    "merged_lora": "LoRA on parts of a fused matrix, as PEFT before 0.7 had it",
}
_TRAINING_ALONE = ("monteclora_config", "velora_config")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two factors: ΔW = scaling · B @ A, or of each expert Bₑ @ Aₑ.

    Attributes:
        A, B: `A` (E · r, in…), `B` (out, r · E, 1…).
        scaling: As the config gives it now.
        experts: E; 1 of what has no experts.
        grouped: The columns of an expert lie together in B; else the expert runs fastest.
        bias: Of `lora_B`, which the scaling multiplies, too.
    """

    A: TensorRef
    B: TensorRef
    scaling: float
    experts: int = 1
    grouped: bool = False
    bias: TensorRef | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0] // self.experts


@dataclass(frozen=True, slots=True)
class Group:
    """What gets one rank: a module, or all sets of factors of fused experts in one.

    Attributes:
        name: Path of the module.
        paths: What patterns of the config have to match.
        pairs: At least one.
    """

    name: str
    paths: tuple[str, ...]
    pairs: tuple[Pair, ...]


def groups_of(adapter: Adapter) -> list[Group]:
    """Every product of two factors that the adapter has.

    Raises:
        Unsupported: Not LoRA of PEFT's, or a variant of it whose factors cannot be made smaller.
        PlanError: Factors that have two readings.
    """
    _refuse(adapter)
    biases = {e.module: e.tensors[0][1] for e in adapter.entries if e.kind == "lora_bias"}
    grouped = adapter.config.get("lora_B_layout") == "grouped_by_expert"
    pairs: dict[str, list[Pair]] = defaultdict(list)
    paths: dict[str, list[str]] = defaultdict(list)
    problems: list[Problem] = []
    for entry in adapter.entries:
        if entry.kind in _COPIED:
            continue
        readings = (entry, *entry.alternatives)
        if len({(e.kind, _experts(e), e.scaling) for e in readings}) > 1:
            problems.append(_two_readings(entry))
            continue
        experts = entry.kind == "lora_experts"
        refs = dict(entry.tensors)
        bias = None if experts else biases.get(entry.module)
        pair = Pair(
            refs["A"], refs["B"], entry.scaling, _experts(entry), grouped=grouped, bias=bias
        )
        pairs[entry.module].append(pair)
        named = [e.target for e in readings] if experts else [entry.module]
        paths[entry.module] += [path for path in named if path not in paths[entry.module]]
    for name, found in pairs.items():
        if len({pair.rank for pair in found}) > 1:
            what = f"module {name!r} has sets of factors of several ranks, and their names are not"
            problems.append(Problem(f"{what} in the file", "only the base tells them apart"))
    if problems:
        raise PlanError(f"the adapter {adapter.given}", problems)
    if not pairs:
        raise Unsupported(f"{adapter.given} has no lora_A and lora_B to make smaller")
    return [Group(name, tuple(paths[name]), tuple(found)) for name, found in pairs.items()]


def _refuse(adapter: Adapter) -> None:
    given = adapter.given
    if adapter.format != "PEFT" or not adapter.keys:
        raise Unsupported(
            f"{given} is an adapter of {adapter.format}, and weft resize reads PEFT's",
            f"weft doctor {given} --base BASE --fix -o FIXED writes it as PEFT has it",
        )
    if adapter.kind != "LORA":
        raise Unsupported(
            f"{given} is a {clean(adapter.kind)} adapter: weft resize makes LoRA's factors smaller",
            _MERGE_IT,
        )
    if adapter.moved_base:
        raise Unsupported(
            f"{given} was initialised with {adapter.moved_base}, which moved the base: its ΔW is "
            "the difference to the initial factors",
            "merge it with --init-adapter; what is merged can be extracted again",
        )
    if field := next((f for f in _TRAINING_ALONE if adapter.config.get(f)), None):
        raise Unsupported(f"{given} sets {field}, whose tensors would not fit another rank")
    kinds = {entry.kind for entry in adapter.entries} - _COPIED - {"lora", "lora_experts"}
    for kind in sorted(kinds):
        why = _REFUSED.get(kind, f"factors of the kind {kind}")
        raise Unsupported(f"{given} cannot be resized; it is {why}", _MERGE_IT)


def _experts(entry: AdapterEntry) -> int:
    count = dict(entry.params).get("experts", 1)
    assert isinstance(count, int)
    return count


def _two_readings(entry: AdapterEntry) -> Problem:
    what = f"the factors of {entry.module!r} may be a layer's or those of fused experts"
    return Problem(
        f"{what}: {', '.join(f'{ref.name} {list(ref.shape)}' for _, ref in entry.tensors)}",
        "name target_parameters in adapter_config.json by their whole path",
    )


def resized_config(
    adapter: Adapter, groups: list[Group], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """`adapter_config.json` where each group has the rank of `ranks`, and scaling 1.

    Patterns are whole paths between `^` and PEFT's own `$`: in whatever order they are tried,
    each matches one module.
    """
    ((common, _),) = Counter(ranks.values()).most_common(1)
    pattern = {
        "^" + re.escape(path): ranks[group.name]
        for group in groups
        for path in group.paths
        if ranks[group.name] != common
    }
    # How it was initialised is of no more use, and some ways have demands on r.
    training = dict.fromkeys(("eva_config", "loftq_config", "corda_config"))
    return {
        **adapter.config,
        **{field: None for field in training if adapter.config.get(field)},
        "r": common,
        "rank_pattern": pattern,
        "lora_alpha": common,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "init_lora_weights": True,
    }
