"""The folder that PEFT loads: key by key, and its config; for what an extraction found.

How PEFT (0.21) reads one was told from its loader: a module of `modules_to_save` needs all of its
parameters in the file; a key without a wrapper goes into the parameter of that name; patterns of
ranks are regular expressions whose order is lost.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weft.core.units import some
from weft.plan._extract_forms import task_type
from weft.plan._moe import PEFT_RELEASE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from weft.core.specs import Shape
    from weft.core.wishes import Rule
    from weft.plan.extract import Change, ExtractPlan

PREFIX = "base_model.model."
# PEFT's own word for: no module is adapted, and some are saved.
_NO_TARGETS = "dummy-target-modules"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file.

    Attributes:
        change: What it is made from.
        role: `A` or `B`, `head_A` or `head_B` for the head of a tied table, `value` in full.
        rank: Of the factors, as they are written.
    """

    key: str
    dtype: str
    shape: Shape
    change: Change
    role: str
    rank: int = 0


@dataclass(slots=True)
class AdapterForm:
    """What the folder holds.

    Attributes:
        entries: In the file's order.
        config: Of `adapter_config.json`.
        ranks: Name -> rank as written.
        scalings: Name -> alpha / rank.
        saved: Names of what is stored in full.
        notes: What the user should know.
    """

    entries: list[Entry] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def adapter_form(
    plan: ExtractPlan, ranks: Mapping[str, int], changed: Collection[str]
) -> AdapterForm:
    """Lay the adapter out.

    Args:
        plan: Of the extraction.
        ranks: Name -> rank, of what is decomposed; with 0 it is left out.
        changed: Names of the tensors that are not the base's.
    """
    form = AdapterForm()
    low = [c for c in plan.changes if c.name in changed and ranks.get(c.name, 0) > 0]
    full = [c for c in plan.changes if c.name in changed and c.name not in ranks]
    full = [c for c in full if c.action != "leave"]
    form.ranks = _evened({c.name: (c, ranks[c.name]) for c in low})
    alpha = plan.wishes.alpha
    form.scalings = {n: alpha / r if alpha else 1.0 for n, r in form.ranks.items()}
    layers = _Layers(plan, low)
    for change in low:
        form.entries += _factors(change, form.ranks[change.name], plan.dtype, layers)
    to_save, plain, biases = _in_full(full, layers)
    for module in to_save:
        for change in layers.inside[module]:
            form.entries += [_value(change, module) for module in (module, *layers.twin(change))]
    form.entries += [_value(change, layers.wrapped(change.module)) for change in [*plain, *biases]]
    form.saved = list(dict.fromkeys(e.change.name for e in form.entries if e.role == "value"))
    twins = [twin for module in to_save for c in layers.inside[module] for twin in layers.twin(c)]
    form.config = _config(plan, form, low, [*to_save, *twins], biases, layers)
    return form


class _Layers:
    """The modules of the model, and how they are wrapped."""

    def __init__(self, plan: ExtractPlan, low: Iterable[Change]) -> None:
        self.inside: dict[str, list[Change]] = defaultdict(list)
        self.children: set[str] = set()
        for change in plan.changes:
            self.inside[change.module].append(change)
            parts = change.module.split(".")
            self.children |= {".".join(parts[:n]) for n in range(1, len(parts))}
        self.adapted: dict[str, list[str]] = defaultdict(list)
        for change in low:
            self.adapted[change.module].append(change.path.rpartition(".")[2])

    def wrapped(self, module: str) -> str:
        """Where a parameter of the module is, with what wraps the module."""
        return module + ".base_layer" * len(self.adapted.get(module, ()))

    def is_leaf(self, module: str) -> bool:
        """All of it can be saved: nothing inside it is adapted, or a module of its own."""
        return module not in self.children and module not in self.adapted

    def ambiguous(self, module: str) -> bool:
        """PEFT takes every module whose path ends so, in the middle of a word, too."""
        known = [*self.inside, *self.children]
        return any(other.endswith(module) and other != module for other in known)

    @staticmethod
    def twin(change: Change) -> list[str]:
        """The module at the other end of a tied table."""
        return [change.head.rpartition(".")[0]] if change.head else []


def _in_full(
    full: Iterable[Change], layers: _Layers
) -> tuple[list[str], list[Change], list[Change]]:
    """Modules for `modules_to_save`, lone parameters, and biases beside weights that stay."""
    to_save: dict[str, None] = {}
    plain, biases = [], []
    full = list(full)
    names = {change.name for change in full}
    for change in full:
        parameter = change.path.rpartition(".")[2]
        weight = next((c for c in layers.inside[change.module] if c.path.endswith(".weight")), None)
        beside_matrix = parameter == "bias" and weight is not None and len(weight.job.shape) > 1
        leaf = layers.is_leaf(change.module) and not layers.ambiguous(change.module)
        if beside_matrix and weight and weight.name not in names:
            biases.append(change)
        elif leaf and parameter in ("weight", "bias"):
            to_save[change.module] = None
        else:
            plain.append(change)
    return list(to_save), plain, biases


def _value(change: Change, module: str) -> Entry:
    parameter = change.path.rpartition(".")[2]
    stem = f"{PREFIX}{module}." if module else PREFIX
    return Entry(f"{stem}{parameter}", change.job.dtype, change.job.shape, change, "value")


def _factors(change: Change, rank: int, dtype: str, layers: _Layers) -> list[Entry]:
    """The two factors, or four for both ends of a tied table."""
    form, shape = change.form, change.job.shape
    inner, outer = (form.rows, form.columns) if form.turned else (form.columns, form.rows)
    A: Shape = (rank * form.count, inner)
    B: Shape = (outer, rank * form.count)
    if form.kind == "kernel":
        A, B = (rank, *shape[1:]), (outer, rank, 1, 1)
    stem = f"{PREFIX}{change.module}"
    if form.kind == "embedding":
        entries = [
            Entry(f"{stem}.lora_embedding_A", dtype, A, change, "A", rank),
            Entry(f"{stem}.lora_embedding_B", dtype, B, change, "B", rank),
        ]
        for head in layers.twin(change):
            entries += [
                Entry(f"{PREFIX}{head}.lora_A.weight", dtype, B[::-1], change, "head_A", rank),
                Entry(f"{PREFIX}{head}.lora_B.weight", dtype, A[::-1], change, "head_B", rank),
            ]
        return entries
    if form.kind == "experts":
        # The wrapper of the parameter that was registered first is the innermost one.
        names = layers.adapted[change.module]
        order = [n for n in _EXPERTS if n in names]
        depth = len(order) - 1 - order.index(change.path.rpartition(".")[2])
        stem += ".base_layer" * depth
    return [
        Entry(f"{stem}.lora_A.weight", dtype, A, change, "A", rank),
        Entry(f"{stem}.lora_B.weight", dtype, B, change, "B", rank),
    ]


_EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


def with_one_rank(changes: Sequence[Change], rule: Rule) -> tuple[list[Change], list[str]]:
    """Fused experts with the largest rank that is asked for any of them, and what to say of it."""
    default = int(rule.value) if rule.kind == "rank" else None
    asked = {
        change.name: default if change.rank is None else change.rank
        for change in changes
        if change.form.kind == "experts" and change.action == "decompose"
    }
    if len(set(asked.values())) < 2:
        return list(changes), []
    most = max(rank or 0 for rank in asked.values())
    others = [change.path for change in changes if asked.get(change.name, most) != most]
    said = (
        f"PEFT has one rank for all fused experts: that of {some(others, 'tensor')} is {most}, "
        "the largest asked for"
    )
    return [replace(c, rank=most) if c.name in asked else c for c in changes], [said]


def _evened(ranks: Mapping[str, tuple[Change, int]]) -> dict[str, int]:
    """Fused experts get one rank: PEFT looks for patterns among modules alone, and would warn."""
    most = max((rank for c, rank in ranks.values() if c.form.kind == "experts"), default=0)
    return {name: most if c.form.kind == "experts" else r for name, (c, r) in ranks.items()}


# ----------------------------------------------------------------------------------------- config


def _config(
    plan: ExtractPlan,
    form: AdapterForm,
    low: Iterable[Change],
    to_save: list[str],
    biases: list[Change],
    layers: _Layers,
) -> dict[str, Any]:
    low = list(low)
    experts = [change for change in low if change.form.kind == "experts"]
    modules = {c.module: form.ranks[c.name] for c in low if c.form.kind != "experts"}
    tied = [change for change in low if change.head]
    modules |= {head: form.ranks[c.name] for c in tied for head in layers.twin(c)}
    common = form.ranks[experts[0].name] if experts else _commonest(modules.values())
    pattern = {f"^{re.escape(m)}": r for m, r in modules.items() if r != common}
    alpha = plan.wishes.alpha
    inside = all(change.module in layers.adapted for change in biases)
    embeddings = {change.module for change in plan.changes if change.head}
    tying = bool(tied) or any(module in embeddings for module in to_save)
    return {
        "alpha_pattern": {} if alpha else pattern,
        "base_model_name_or_path": plan.base_model,
        "bias": "none" if not biases else "lora_only" if inside else "all",
        "ensure_weight_tying": tying,
        "exclude_modules": None,
        "fan_in_fan_out": any(change.form.kind == "conv1d" for change in low),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(alpha) if alpha else common,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": to_save or None,
        "peft_type": "LORA",
        **({"peft_version": PEFT_RELEASE} if experts else {}),
        "r": common,
        "rank_pattern": pattern,
        "revision": plan.revision,
        "target_modules": _targets(plan, modules) if low else _NO_TARGETS,
        "target_parameters": sorted(change.path for change in experts) or None,
        "task_type": task_type(plan.config),
        "use_dora": False,
        "use_rslora": False,
    }


def _commonest(ranks: Iterable[int]) -> int:
    counts = Counter(ranks)
    return max(counts, key=lambda rank: (counts[rank], rank)) if counts else 1


def _number(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha


def _targets(plan: ExtractPlan, modules: Collection[str]) -> list[str]:
    """By the last name, where all modules of that name are meant; else by the whole path."""
    theirs: dict[str, set[str]] = defaultdict(set)
    for path in plan.paths:
        parts = path.split(".")[:-1]
        for n in range(1, len(parts) + 1):
            theirs[parts[n - 1]].add(".".join(parts[:n]))
    ours: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        ours[module.rpartition(".")[2]].add(module)
    return sorted(
        target
        for leaf, paths in ours.items()
        for target in ([leaf] if theirs[leaf] <= paths else sorted(paths))
    )
