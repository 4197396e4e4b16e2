"""W′ of each kind of adapter in `tests/corpus`, by its formula, in numpy and float64 alone.

Each function takes W as (out, in) where it is a matrix, the tensors of a module by the end of their
keys, and what is asked of the config. The papers are named in `docs/reference/adapters.md`. Nothing
here is of Weft, nor of PEFT, but for the places that torch's generator draws.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file

from oracle.method_formulas import METHODS, flat, glora_bias, ia3, road_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from oracle.corpus_entries import Entry

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Module:
    """One module of an adapter.

    Attributes:
        name: Its path.
        W: Its weight, (out, in) of a matrix.
        t: End of a key, without the adapter's prefixes -> its values.
        config: `adapter_config.json`.
        shared: What all modules use.
        b: Its bias.
    """

    name: str
    W: Array
    t: Mapping[str, Array]
    config: Mapping[str, Any]
    shared: Mapping[str, Array]
    b: Array | None

    def of(self, field: str, patterns: str) -> Any:
        """What the config says of the module: by a pattern, or for all."""
        found = (self.config.get(patterns) or {}).items()
        own = [value for p, value in found if re.fullmatch(rf"(.*\.)?{p}", self.name)]
        return (own or [self.config.get(field)])[0]

    def scaling(self, rank: int, field: str = "lora_alpha") -> float:
        alpha = self.of(field, "alpha_pattern")
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def lora(m: Module) -> Array:
    """W + s · (B A − B₀ A₀), B₀ A₀ of a base that was moved; KaSA's d, DoRA's norm, BD-LoRA."""
    A, B = flat(m.t["lora_A.weight"]), flat(m.t["lora_B.weight"])
    W = flat(m.W)
    if m.config.get("use_bdlora"):
        A, B = (
            np.block([[part if r == c else 0 * part for c in range(2)]
                      for r, part in enumerate(np.split(F, 2))])
            if thin else F
            for F, thin in ((A, A.shape[1] < W.shape[1]), (B, B.shape[1] < len(A)))
        )  # fmt: skip
    if (d := m.t.get("lora_diag")) is not None:
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
        S[-len(A) :] = 0
        W, B = U * S @ Vt, B * d
    if A.shape[1] < W.shape[1] and m.config.get("use_qalora"):
        groups, size = A.shape[1], m.config["qalora_group_size"]
        A = groups * np.repeat(A, size, axis=1) / size  # of `groups` times the mean of each
    V = W + m.scaling(len(A)) * B @ A
    if "initial_A" in m.t:
        V -= m.scaling(len(A)) * m.t["initial_B"] @ m.t["initial_A"]
    magnitude = m.t.get("lora_magnitude_vector", m.t.get("lora_magnitude_vector.weight"))
    if magnitude is not None:
        V *= (magnitude.reshape(-1) / np.linalg.norm(V, axis=1))[:, None]
    return V.reshape(m.W.shape)


def lora_of_a_table(m: Module) -> Array:
    """W (V, H) + s · (B A)ᵀ; DoRA's norm is that of a column."""
    A, B = m.t["lora_embedding_A"], m.t["lora_embedding_B"]
    V = m.W + m.scaling(len(A)) * (B @ A).T
    if (magnitude := m.t.get("lora_magnitude_vector")) is not None:
        V *= magnitude / np.linalg.norm(V, axis=0)
    return V


def lora_of_parts(m: Module) -> Array:
    """`enable_lora`: one A and one B for each of the three parts that is enabled."""
    flags = m.config["enable_lora"]
    V, size, s = m.W.copy(), len(m.W) // len(flags), m.scaling(m.config["r"])
    A, B = (np.split(m.t[f"lora_{n}.weight"], sum(flags)) for n in "AB")
    for n, part in enumerate(np.flatnonzero(flags)):
        V[part * size : (part + 1) * size] += s * B[n][..., 0] @ A[n]
    return V


def lora_of_experts(m: Module) -> Array:
    """Wₑ + s · Bₑ Aₑ; A has the rows of an expert together, the expert runs fastest in B."""
    E = len(m.W)
    A, B = m.t["lora_A.weight"], m.t["lora_B.weight"]
    V, s = m.W.copy(), m.scaling(len(A) // E)
    for e, Ae in enumerate(np.split(A, E)):
        delta = s * B[:, e::E] @ Ae
        V[e] += delta if delta.shape == V[e].shape else delta.T
    return V


def merged(entry: Entry, corpus: Path) -> dict[str, Array]:
    """Name -> W′ (or b′) of every tensor that the adapter changes, by its files and the base's."""
    config, base = entry.config(corpus), base_of(entry, corpus)
    tensors = arrays(entry.tensors(corpus))
    shared = {
        key.removeprefix("base_model."): value
        for key, value in tensors.items()
        if not key.startswith(PREFIX)
    }
    found = replaced(tensors, config, base)
    initial = by_module(arrays(entry.initial_tensors(corpus)))
    for name, own in by_module(tensors).items():
        for factor in "AB" if name in initial else "":
            own[f"initial_{factor}"] = initial[name][f"lora_{factor}.weight"]
        parameter = parameter_of(name, base)
        W = base[parameter]
        turned = entry.model == "gpt2" and W.ndim == 2 and ".h." in name
        b = base.get(f"{name}.bias")
        m = Module(name, W.T if turned else W, own, config, shared, b)
        for target, formula in formulas_of(m, parameter):
            value = formula(m)
            found[target] = value.T if turned and target == parameter else value
    return found


PREFIX = "base_model.model."


def base_of(entry: Entry, corpus: Path) -> dict[str, Array]:
    """The base, with a tied head by its name, and with the copies of `layer_replication`."""
    base = arrays(load_file(corpus / "double" / entry.model / "model.safetensors"))
    if "lm_head.weight" not in base and "model.embed_tokens.weight" in base:
        base["lm_head.weight"] = base["model.embed_tokens.weight"]
    ranges = entry.config(corpus).get("layer_replication")
    if not ranges:
        return base
    rest = {n: v for n, v in base.items() if ".layers." not in n}
    for new, old in enumerate(n for start, stop in ranges for n in range(start, stop)):
        inside = f"model.layers.{old}."
        rest |= {n.replace(inside, f"model.layers.{new}."): base[n] for n in base if inside in n}
    return rest


def replaced(
    tensors: Mapping[str, Array], config: Mapping[str, Any], base: Mapping[str, Array]
) -> dict[str, Array]:
    """Whole tensors in place of the base's, and single rows of them."""
    found: dict[str, Array] = {}
    ends: list[str] = []
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX).replace("token_adapter.", "")
        for wrapper in (".base_layer", ".ln_tuning_layers", ".modules_to_save"):
            name = name.replace(wrapper, "")
        if name in base:
            found[name] = value
            ends += [name] if "merge_weights" in config else []
        elif name.endswith(".trainable_tokens_delta"):
            module = name.removesuffix(".trainable_tokens_delta")
            rows = config.get("trainable_token_indices") or config.get("token_indices")
            rows = rows["embed_tokens"] if isinstance(rows, dict) else rows
            found[f"{module}.weight"] = base[f"{module}.weight"].copy()
            found[f"{module}.weight"][rows] = value
            ends.append(f"{module}.weight")
    tied = base.get("lm_head.weight") is base.get("model.embed_tokens.weight")
    # Rows, and what PEFT before 0.3 saved, are of both ends.
    if tied and "model.embed_tokens.weight" in ends:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in tensors.items()}


def formulas_of(m: Module, parameter: str) -> list[tuple[str, Callable[[Module], Array]]]:
    """What of the module changes, and how."""
    kind, bias = m.config["peft_type"], f"{m.name}.bias"
    if kind == "BEFT":
        return [(bias, lambda m: m.b + m.t["beft_bias"].reshape(-1))]
    if "lora_embedding_A" in m.t:
        return [(parameter, lora_of_a_table)]
    if kind == "LORA":
        experts = m.W.ndim == 3 and "experts" in m.name
        parts = m.config.get("enable_lora")
        found = [(parameter, lora_of_experts if experts else lora_of_parts if parts else lora)]
        if (added := m.t.get("lora_B.bias")) is not None:
            s = m.scaling(len(m.t["lora_A.weight"]))
            found.append((bias, lambda m: m.b + s * added))
        return found
    found = [(parameter, METHODS[kind])]
    if m.b is not None and kind == "ROAD":
        found.append((bias, lambda m: road_matrix(m) @ m.b))
    if m.b is not None and kind == "GLORA":
        found.append((bias, glora_bias))
    rows = kind == "IA3" and ia3(m).shape == m.W.shape
    if m.b is not None and rows and not m.name.endswith(tuple(m.config["feedforward_modules"])):
        found.append((bias, lambda m: m.b * m.t["ia3_l"].reshape(-1)))
    return found


_FACTOR = re.compile(
    r"^(.*?)\.((?:base_layer\.)*(?:lora|hada|lokr|vera|pvera|ia3|hra|hira|miss|bone|gralora|delora"
    r"|c3a|oft|boft|road|shira|supertuning|fourierft|vblora|randlora|deft|glora|peanut|osf|unilora"
    r"|beft|waveft|frod|tinylora)_.*)$"
)


def by_module(tensors: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Module -> its factors, by the ends of their keys; of nested wrappers each by itself."""
    found: dict[str, dict[str, Array]] = {}
    for key, value in tensors.items():
        path = key.removeprefix(PREFIX).replace(".base_layer.out_proj.", ".out_proj.")
        if key.startswith(PREFIX) and (hit := _FACTOR.match(path)):
            module, rest = hit.groups()
            name = f"{module}{'.inner' * rest.count('base_layer.')}"
            found.setdefault(name, {})[rest.replace("base_layer.", "")] = value
    return found


def parameter_of(name: str, base: Mapping[str, Array]) -> str:
    """The weight, or of fused experts the parameter that the nesting tells."""
    module = name.removesuffix(".inner")
    inside = "gate_up_proj" if name.endswith(".inner") else "down_proj"
    known = (f"{module}.{parameter}" for parameter in ("weight", "in_proj_weight", inside))
    return next(parameter for parameter in known if parameter in base)
