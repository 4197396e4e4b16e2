"""An adapter of another tool, as PEFT would have saved it: its tensors, turned, and its config.

Nothing is computed: factors are transposed, rows and axes put into another order, and so the merged
weight has the same bits. What PEFT has no form for is refused by name.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.core.errors import WeftError
from weft.core.specs import AddDeltas
from weft.formats.adapters._repairs import PREFIX
from weft.plan._in_memory import in_memory
from weft.plan._layouts import fitted
from weft.plan._targets import CONV1D_MODULES
from weft.plan._tied import find_tie
from weft.write._lokr_form import lokr_config
from weft.write.adapter import Piece

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weft.core.specs import Adapter, AdapterEntry, Checkpoint, Delta, Plan, Shape, TensorRef

_TYPES = {"lora": "LORA", "dora": "LORA", "loha": "LOHA", "lokr": "LOKR"}
_AS_IT_IS = "weft merge reads it as it is"


@dataclass(frozen=True, slots=True)
class Placed:
    """One module of the adapter.

    Attributes:
        path: What the model calls it.
        delta: What is done to its weight, every question that the base decides being decided.
        shape: Of the weight on disk.
        rank: What divides alpha.
    """

    path: str
    delta: Delta
    shape: Shape
    rank: int

    @property
    def shapes(self) -> dict[str, Shape]:
        return {role: ref.shape for role, ref in self.delta.tensors}


def peft_form(
    base: Checkpoint, adapter: Adapter, plan: Plan
) -> tuple[dict[str, Piece], dict[str, Any]]:
    """The keys of `adapter_model.safetensors` with what lies behind each, and the config.

    Args:
        base: The model, whose names its modules get.
        adapter: One that is not PEFT's.
        plan: Its merge into `base`, alone and with weight 1.

    Raises:
        WeftError: PEFT has no form for what the adapter does.
    """
    placed = _placed(base, adapter, plan)
    types = {_TYPES[module.delta.kind] for module in placed}
    if len(types) > 1:
        raise _cannot(adapter, f"it is {' and '.join(sorted(types))}, and a PEFT folder is of one")
    (kind,) = types
    if kernels := [module.path for module in placed if len(module.shape) > 2]:
        raise _cannot(adapter, f"{kernels[0]} is a convolution, and weft writes matrices alone")
    config = _common(base, placed)
    pieces: dict[str, Piece] = {}
    if kind == "LORA":
        config |= _lora_config(adapter, placed)
        for module in placed:
            pieces |= _lora_pieces(module)
    else:
        config |= _lycoris_config(adapter, placed, kind)
        ending = "hada" if kind == "LOHA" else "lokr"
        for module in placed:
            for role, ref in module.delta.tensors:
                pieces[f"{PREFIX}{module.path}.{ending}_{role}"] = Piece(ref, ref.shape)
    return pieces, dict(sorted((config | {"peft_type": kind}).items()))


def _cannot(adapter: Adapter, why: str) -> WeftError:
    return WeftError(f"{adapter.given} cannot be written as PEFT has it: {why}", _AS_IT_IS)


# ---------------------------------------------------------------------------------------- modules


def _placed(base: Checkpoint, adapter: Adapter, plan: Plan) -> list[Placed]:
    done: dict[tuple[tuple[str, TensorRef], ...], tuple[str, Shape, Delta]] = {}
    for job in plan.jobs:
        for delta in job.expression.deltas if isinstance(job.expression, AddDeltas) else ():
            done.setdefault(delta.tensors, (job.name, job.shape, delta))
    placed = []
    for entry in fitted(base, adapter)[0].entries:
        if entry.kind not in _TYPES:
            what = f"{entry.target} is trained in full" if entry.kind == "replace" else entry.kind
            raise _cannot(adapter, f"{what}, and PEFT has adapters")
        name, shape, delta = done[entry.tensors]
        if why := _no_form(entry, delta, tied=find_tie(base, [(adapter, 1)]) is not None):
            raise _cannot(adapter, why)
        path = _path(adapter, entry, in_memory(name, base.config))
        placed.append(Placed(path, delta, shape, _rank(delta)))
    return placed


def _no_form(entry: AdapterEntry, delta: Delta, *, tied: bool) -> str | None:
    """Why PEFT has nothing that does the same to the module, if so."""
    params = dict(delta.params)
    table = delta.kind == "dora" and params.get("both_ends")
    if table or (delta.kind == "dora" and params.get("transposed")):
        return f"{entry.module} is DoRA with norms along the other axis of the weight"
    if params.get("both_ends") and tied:
        return f"{entry.module} is tied to the output, and changes there, too"
    return None


def _path(adapter: Adapter, entry: AdapterEntry, name: str) -> str:
    """The module in the model that transformers makes: a file of the bare model lacks a prefix."""
    if entry.target != name and entry.target.endswith("." + name):
        if adapter.format == "mlx-lm":
            raise _cannot(
                adapter,
                f"the base has {name} without the prefix that its modules have in transformers, "
                "which mlx-lm calls otherwise",
            )
        return entry.module
    return name.removesuffix(".weight")


def _rank(delta: Delta) -> int:
    shapes = {role: ref.shape for role, ref in delta.tensors}
    if "A" in shapes:
        return shapes["A"][1 if dict(delta.params).get("factors_transposed") else 0]
    if parts := [shape for role, shape in shapes.items() if role.endswith("_b")]:
        return parts[0][0]
    # LoKr of two full factors: from this rank on PEFT keeps them so.
    return max(max(shapes["w1"]), max(shapes["w2"]))


# ----------------------------------------------------------------------------------------- config


def _common(base: Checkpoint, placed: Sequence[Placed]) -> dict[str, Any]:
    architecture = (base.config.get("architectures") or [""])[0] or ""
    ranks = _patterns((module.path, module.rank) for module in placed)
    return {
        "base_model_name_or_path": base.given,
        "exclude_modules": None,  # said, as of releases whose LoKr is scaled
        "inference_mode": True,
        "r": ranks[0],
        "rank_pattern": ranks[1],
        "target_modules": _targets(base, placed),
        "task_type": "CAUSAL_LM" if architecture.endswith("ForCausalLM") else None,
    }


def _lora_config(adapter: Adapter, placed: Sequence[Placed]) -> dict[str, Any]:
    kinds = {module.delta.kind for module in placed}
    if len(kinds) > 1:
        raise _cannot(adapter, "some modules have DoRA's magnitude and some have none")
    alpha, pattern = _patterns((module.path, _alpha(adapter, module)) for module in placed)
    return {
        "bias": "none",
        "fan_in_fan_out": any(_is_conv1d(module) for module in placed),
        "lora_alpha": alpha,
        "alpha_pattern": pattern,
        "use_dora": kinds == {"dora"},
    }


def _lycoris_config(adapter: Adapter, placed: Sequence[Placed], kind: str) -> dict[str, Any]:
    alpha, pattern = _patterns((module.path, _alpha(adapter, module)) for module in placed)
    config = {"alpha": alpha, "alpha_pattern": pattern}
    if kind == "LOKR":
        own = lokr_config([(module.shape, module.shapes, module.rank) for module in placed])
        if own is None:
            raise _cannot(adapter, "PEFT would cut its Kronecker factors otherwise")
        config |= own
    return config


def _patterns(values: Iterable[tuple[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and by module those that differ; `^` keeps other modules out."""
    found = dict(values)
    ((common, _),) = Counter(found.values()).most_common(1)
    return common, {f"^{path}": value for path, value in found.items() if value != common}


def _alpha(adapter: Adapter, module: Placed) -> float | int:
    """What divided by the rank is the scaling, to the bit that arithmetic in float32 sees."""
    scaling, rank = module.delta.scaling, module.rank
    near = scaling * rank
    near = float(round(near)) if round(near) / rank == scaling else near
    tried = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    exact = [alpha for alpha in tried if alpha / rank == scaling]
    alpha = (exact or [near])[0]
    wide = any(ref.dtype == "float64" for _, ref in module.delta.tensors)
    if not exact and (wide or np.float32(alpha / rank) != np.float32(scaling)):
        raise _cannot(adapter, f"no lora_alpha over r = {rank} is {scaling!r} ({module.path})")
    return int(alpha) if alpha.is_integer() else alpha


def _targets(base: Checkpoint, placed: Sequence[Placed]) -> list[str]:
    """Modules by their last name, where the base has no others of that name; else by their path."""
    ours: dict[str, set[str]] = defaultdict(set)
    theirs: dict[str, set[str]] = defaultdict(set)
    for module in placed:
        ours[module.path.rpartition(".")[2]].add(module.path)
    for name in base.tensors:
        path = name.removesuffix(".weight")
        theirs[path.rpartition(".")[2]].add(path)
    return sorted(
        target
        for leaf, paths in ours.items()
        for target in ([leaf] if len(theirs[leaf]) <= len(paths) else paths)
    )


# ---------------------------------------------------------------------------------------- tensors


def _is_conv1d(module: Placed) -> bool:
    turned = dict(module.delta.params).get("transposed", False)
    return bool(turned) and module.path.rpartition(".")[2] in CONV1D_MODULES


def _lora_pieces(module: Placed) -> dict[str, Piece]:
    params = dict(module.delta.params)
    refs: Mapping[str, TensorRef] = dict(module.delta.tensors)
    turned = bool(params.get("factors_transposed", False))
    heads = int(params.get("rotary_heads", 0))  # type: ignore[arg-type]
    A, B = (refs[role].shape[::-1] if turned else refs[role].shape for role in "AB")
    stem = f"{PREFIX}{module.path}."
    if params.get("transposed") and not _is_conv1d(module):
        return {
            f"{stem}lora_embedding_A": Piece(refs["A"], A, turned),
            f"{stem}lora_embedding_B": Piece(refs["B"], B, turned),
        }
    pieces = {
        f"{stem}lora_A.weight": Piece(refs["A"], A, turned),
        f"{stem}lora_B.weight": Piece(refs["B"], B, turned, heads),
    }
    if magnitude := refs.get("magnitude"):
        pieces[f"{stem}lora_magnitude_vector"] = Piece(magnitude, B[:1], heads=heads)
    return pieces
