"""An adapter of an older PEFT, as PEFT of today would have saved it: for `weft doctor --fix`.

What PEFT of today reads otherwise than the release that wrote it is brought into the form that it
reads right: keys and fields renamed, factors turned. Nothing is computed, so the merged weight has
the same bits. What has no such form is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.core.errors import WeftError
from weft.core.specs import AddDeltas
from weft.formats.adapters._peft_config import FOREIGN, KNOWN, matching, trains_in_place
from weft.formats.adapters._peft_lora import SUFFIXES
from weft.formats.adapters._peft_methods import methods
from weft.formats.adapters._repairs import PREFIX
from weft.plan._tied import HEADS, find_tie
from weft.write._present_experts import fused_by_peft, single_experts, turned_experts
from weft.write.adapter import Made, Piece

if TYPE_CHECKING:
    from collections.abc import Callable

    from weft.core.specs import Adapter, Checkpoint, Delta, Plan, Shape

Tensors = dict[str, Piece | Made]
_AS_IT_IS = "weft merge reads it as it is"


@dataclass(slots=True)
class Form:
    """What is to be written, and what was brought into another form.

    Attributes:
        adapter: As it was read.
        tensors: By the key that is written.
        config: `adapter_config.json`.
        base: The model that it fits, if one was given.
        plan: Its merge into that.
        done: A line for each thing that was brought into another form.
    """

    adapter: Adapter
    tensors: Tensors
    config: dict[str, Any]
    base: Checkpoint | None
    plan: Plan | None
    done: list[str] = field(default_factory=list)

    def cannot(self, why: str, cure: str = _AS_IT_IS) -> WeftError:
        return WeftError(f"{self.adapter.given} cannot be written as PEFT of today has it: {why}",
                         cure)  # fmt: skip

    def changes(self) -> list[tuple[str, Shape, Delta]]:
        """Name and shape of what each delta changes."""
        jobs = self.plan.jobs if self.plan else ()
        return [
            (job.name, job.shape, delta)
            for job in jobs
            if isinstance(job.expression, AddDeltas)
            for delta in job.expression.deltas
        ]

    def deltas(self) -> list[Delta]:
        return [delta for _, _, delta in self.changes()]

    def put(self, key: str, tensor: Piece | Made) -> None:
        self.tensors[key] = tensor


def bring_up_to_date(form: Form) -> None:
    """Change `form` into what PEFT of today would have written.

    Raises:
        WeftError: PEFT of today has no form for what the adapter does.
    """
    for rule in RULES:
        rule(form)


def _parts_of_fused(form: Form) -> None:
    if form.config.get("enable_lora"):
        raise form.cannot("PEFT adapts parts of a fused matrix (enable_lora) up to 0.2 alone")


def _trained_in_place(form: Form) -> None:
    """PEFT 0.2 trained a tied embedding itself: today that is `ensure_weight_tying`, and two keys.

    Without a base nobody knows whether it was tied.
    """
    saved = {entry.target: entry for entry in form.adapter.entries if entry.saved_as}
    if not trains_in_place(form.config) or not saved:
        return
    if form.base is None:
        why = "PEFT before 0.3 trained both ends of tied embeddings, and whether they are, a base "
        raise form.cannot(f"{why}says", "weft doctor ADAPTER --base BASE --fix -o FIXED")
    tie = find_tie(form.base, [(form.adapter, 1.0)])
    ends = (tie.embedding, tie.head) if tie else ()
    named = [(end, entry) for end in ends for t, entry in saved.items() if _same_name(t, end)]
    if not tie or not named:
        return
    ((_, ref),) = named[0][1].tensors
    for end in ends:
        module = end.removesuffix(".weight")
        form.put(f"{PREFIX}{_as_in_model(form, module)}.weight", Piece(ref, ref.shape))
    form.config["ensure_weight_tying"] = True
    form.done.append("ensure_weight_tying: PEFT before 0.3 trained both ends of the tied embedding")


def _same_name(target: str, name: str) -> bool:
    return target == name or target.endswith(f".{name}") or name.endswith(f".{target}")


def _as_in_model(form: Form, module: str) -> str:
    """The module under the name that the adapter has for it, if it has one."""
    known = (entry.module for entry in form.adapter.entries)
    return next((m for m in known if _same_name(f"{m}.weight", f"{module}.weight")), module)


def _tied_factors(form: Form) -> None:
    """PEFT 0.18 has `ensure_weight_tying`, and does not heed it where an embedding has LoRA."""
    if not form.config.get("ensure_weight_tying") or form.config["peft_type"] != "LORA":
        return
    ends = [
        e for e in form.adapter.entries if dict(e.params).get("transposed") and e.kind == "lora"
    ]
    if ends and not any(e.module.endswith(HEADS) for e in form.adapter.entries):
        form.config["ensure_weight_tying"] = False
        form.done.append("ensure_weight_tying = false: PEFT left the head as it was")


def _biases(form: Form) -> None:
    """Before 0.7 a layer was no wrapper: its bias is `<module>.bias` there, and not looked for."""
    method = methods().get(form.config["peft_type"])
    endings = (method.SUFFIXES if method else SUFFIXES).keys()
    moved = {}
    for key in form.tensors:
        module = key.removesuffix(".bias")
        if module != key and any(module + ending in form.tensors for ending in endings):
            moved[key] = f"{module}.base_layer.bias"
    form.tensors = {moved.get(key, key): value for key, value in form.tensors.items()}
    if moved:
        form.done.append(f"{len(moved)} biases as base_layer.bias, which is where PEFT looks")


def _bone(form: Form) -> None:
    """PEFT 0.19 dropped Bone, which had become MiSS: `bone_block` is `miss_block`."""
    if form.config["peft_type"] != "BONE":
        return
    form.tensors = {k.replace(".bone_", ".miss_"): v for k, v in form.tensors.items()}
    form.config["peft_type"] = "MISS"
    form.done.append("Bone as MiSS, which it is called since PEFT 0.19")


def _lokr(form: Form) -> None:
    """Before 0.14 LoKr was trained without alpha / r: today that is an alpha of r."""
    if form.config["peft_type"] != "LOKR" or "exclude_modules" in form.config:
        return
    alphas = {"alpha": form.config["r"], "alpha_pattern": form.config.get("rank_pattern") or {}}
    if any(form.config.get(name) != value for name, value in alphas.items()):
        form.done.append("alpha = r: PEFT before 0.14 trained LoKr without alpha / r")
    form.config |= {"exclude_modules": None, **alphas}


def _oft(form: Form) -> None:
    """Up to 0.13 it rotated the outputs; the series of 0.16 and 0.17 has twice the last power."""
    config = form.config
    if config["peft_type"] != "OFT":
        return
    if "use_cayley_neumann" not in config:
        raise form.cannot("PEFT from 0.14 on rotates the inputs, and this rotates the outputs")
    series = config["use_cayley_neumann"] and config["num_cayley_neumann_terms"] > 2
    if series and not config.get("peft_version"):
        raise form.cannot("PEFT from 0.18 on computes another Neumann series than it trained with")


def _fields(form: Form) -> None:
    """Fields that PEFT's class does not have: it names them in a warning, and goes on without."""
    method = methods().get(form.config["peft_type"])
    known = (KNOWN | method.FIELDS if method else KNOWN) - FOREIGN
    dropped = sorted(set(form.config) - known)
    form.config = {key: value for key, value in form.config.items() if key in known}
    if dropped:
        form.done.append(f"without {', '.join(dropped)}, which PEFT's config does not have")


def _idle_patterns(form: Form) -> None:
    """PEFT warns of patterns that match nothing."""
    # Those of experts name parameters, and AdaLoRA's are something else.
    if form.config.get("peft_type") != "LORA" or form.config.get("target_parameters"):
        return
    for each in ("rank_pattern", "alpha_pattern"):
        patterns = form.config.get(each) or {}
        modules = [entry.module for entry in form.adapter.entries]
        idle = [p for p in patterns if not any(matching({p: 0}, name) for name in modules)]
        if idle:
            form.config[each] = {p: v for p, v in patterns.items() if p not in idle}
            form.done.append(f"{each} without {', '.join(idle)}: no module is called so")


RULES: tuple[Callable[[Form], None], ...] = (
    *(_parts_of_fused, _trained_in_place, _tied_factors, _biases, _bone, _lokr, _oft),
    *(turned_experts, single_experts, fused_by_peft, _fields, _idle_patterns),
)
