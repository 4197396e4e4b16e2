"""Experts as PEFT of today has them: in one tensor, rank by rank, A for the inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from weft.formats.adapters._repairs import PREFIX
from weft.plan._experts import release_of
from weft.plan._moe import ONE_EXPERT, PEFT_RELEASE, TRANSPOSED, TURNED_ON_DISK, Base
from weft.write._expert_form import Stacked, as_today, stacked
from weft.write.adapter import Piece

if TYPE_CHECKING:
    from weft.core.specs import Delta
    from weft.write.adapter import Made
    from weft.write.present_form import Form

_WITH_BASE = "weft doctor ADAPTER --base BASE --fix -o FIXED"


def turned_experts(form: Form) -> None:
    """PEFT 0.17 and 0.18 exchanged inputs and outputs; Unsloth had the columns of B by expert."""
    lies_turned = _lies_turned(form)
    wholes = {(ref.file, ref.start): ref for ref in form.adapter.tensors.values()}
    pairs: dict[str, tuple[Made, Made]] = {}
    for delta in form.deltas():
        if delta.kind not in ("lora_experts", "lora_expert"):
            continue
        B = dict(delta.tensors)["B"]
        exchanged, grouped = (bool(delta.param(n, False)) for n in ("exchanged", "grouped"))
        turned = exchanged != (lies_turned and delta.kind == "lora_experts")
        experts = delta.param("experts", 0)
        assert isinstance(experts, int)
        if turned or grouped:
            A = form.adapter.tensors[B.name.replace("lora_B", "lora_A")]
            whole = wholes[B.file, B.start]
            pairs[B.name] = as_today(A, whole, experts, turned=turned, grouped=grouped)
    for key, old in form.tensors.items():
        if not isinstance(old, Piece):
            continue
        for name, (A_made, B_made) in pairs.items():
            if old.ref.name == name:
                form.tensors[key] = B_made
            elif old.ref.name == name.replace("lora_B", "lora_A"):
                form.tensors[key] = A_made
    if pairs:
        form.config["peft_version"] = PEFT_RELEASE
        form.done.append(f"{len(pairs)} pairs of factors of fused experts in the order of today")
    elif form.base is None and _may_be_turned(form.config):
        raise form.cannot("how the factors of fused experts lie depends on the base", _WITH_BASE)


def _lies_turned(form: Form) -> bool:
    """Whether W is (E, in, out) on disk, and PEFT has A for the inputs all the same."""
    types = Base(form.base).model_types() if form.base else set()
    return bool(types & (TRANSPOSED | TURNED_ON_DISK))


def _may_be_turned(config: dict[str, Any]) -> bool:
    release = release_of(config.get("peft_version"))
    return bool(config.get("target_parameters")) and (
        release is None
        or release <= (0, 19, 0)
        or config.get("lora_B_layout") == "grouped_by_expert"
    )


def single_experts(form: Form) -> None:
    """Adapters of transformers 4, one matrix for each expert: fused, where the base is."""
    stacks = [delta for delta in form.deltas() if delta.kind == "lora_stacked"]
    if stacks:
        _fuse(form, stacks)
    elif any(ONE_EXPERT.match(entry.module) for entry in form.adapter.entries):
        raise form.cannot(
            "PEFT under transformers 5 wants the experts of a layer in one tensor, and these are "
            "one by one",
            "give a base that is saved so (save_original_format=False): " + _WITH_BASE,
        )


def _fuse(form: Form, stacks: list[Delta]) -> None:
    """All with the rank of the widest, so that PEFT needs no pattern, of which it would warn."""
    if any("scalings" in dict(delta.params) for delta in stacks) or (
        len({delta.scaling for delta in stacks}) > 1
    ):
        raise form.cannot("its experts have several scalings, and fused they have one")
    if any(delta.param("exchanged", False) for delta in stacks) and not _lies_turned(form):
        raise form.cannot("the base has its experts (E, in, out)")
    made: dict[str, dict[str, Stacked]] = defaultdict(dict)
    for name, shape, delta in form.changes():
        if delta.kind == "lora_stacked":
            module, _, parameter = name.rpartition(".")
            made[module][parameter] = stacked(delta, shape[0])
    rank = max(one.rank for several in made.values() for one in several.values())
    used = {ref.name for delta in stacks for _, ref in delta.tensors}
    form.tensors = {
        key: value
        for key, value in form.tensors.items()
        if not (isinstance(value, Piece) and value.ref.name in used)
    }
    for module, several in made.items():
        # The parameter that the module registers first is wrapped innermost.
        ordered = sorted(several, key=("gate_up_proj", "up_proj", "down_proj").index)
        for depth, parameter in enumerate(reversed(ordered)):
            stem = f"{PREFIX}{module}." + "base_layer." * depth
            A, B = several[parameter].factors(rank)
            form.put(f"{stem}lora_A.weight", A)
            form.put(f"{stem}lora_B.weight", B)
    _fused_config(form, stacks[0].scaling, rank, made)
    form.done.append("the experts fused, as the base has them")


def _fused_config(
    form: Form, scaling: float, rank: int, made: dict[str, dict[str, Stacked]]
) -> None:
    """Every scaling as a plain alpha / r, the layers beside the experts by their paths."""
    layers = {
        entry.module: (entry.scaling, dict(entry.tensors)["A"].shape[0])
        for entry in form.adapter.entries
        if entry.kind in ("lora", "dora") and not ONE_EXPERT.match(entry.module)
    }
    parameters = sorted(
        {f"{module.rpartition('.')[2]}.{name}" for module, several in made.items()
         for name in several}
    )  # fmt: skip
    form.config |= {
        "r": rank,
        "lora_alpha": scaling * rank,
        "use_rslora": False,
        "peft_version": PEFT_RELEASE,
        "target_modules": sorted(layers),
        "target_parameters": parameters,
        "rank_pattern": {f"^{m}": r for m, (_, r) in layers.items() if r != rank},
        "alpha_pattern": {
            f"^{m}": s * r for m, (s, r) in layers.items() if s * r != scaling * rank
        },
    }


def fused_by_peft(form: Form) -> None:
    """What PEFT fused has its √2 already: alpha is written so that it goes."""
    kinds = ("lora_experts", "lora_expert")
    scalings = {delta.scaling for delta in form.deltas() if delta.kind in kinds}
    ranks, alphas = (form.config.get(n) or {} for n in ("rank_pattern", "alpha_pattern"))
    pattern = next((p for p in ranks if p in alphas and "gate_up_proj" in p), None)
    if not form.config.get("use_rslora") or pattern is None:
        return
    trained = alphas[pattern] / math.sqrt(ranks[pattern]) / math.sqrt(2)
    if any(math.isclose(trained, scaling, rel_tol=1e-12) for scaling in scalings):
        form.config["alpha_pattern"] = {**alphas, pattern: alphas[pattern] / math.sqrt(2)}
        form.done.append("alpha of gate_up_proj as it was trained: PEFT made it √2 too large")
