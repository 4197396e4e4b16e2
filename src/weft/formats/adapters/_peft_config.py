"""`adapter_config.json`: which fields change the merged weight, and what they say of a module."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from weft.core.errors import FormatError, Problem, Unsupported
from weft.core.selection import Modules, Selection
from weft.core.units import clean
from weft.formats.adapters._peft_methods import methods

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from weft.core.specs import TensorRef

CONFIG = "adapter_config.json"

# Config fields that make the merged weight something other than W + s·BA, and what they are.
_VARIANTS = {
    "layer_replication": "layer_replication (a deeper model that shares weights)",
    "megatron_config": "Megatron parallel layers",
    "alora_invocation_tokens": "aLoRA, which is active after some tokens only: no merged weight",
    "arrow_config": "Arrow, which routes each token to another adapter: no merged weight",
}
_PLAIN_INIT = {"gaussian", "eva", "orthogonal", "mica"}
_MOVED_INIT = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "loftq": "LoftQ",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
}
KNOWN = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "use_dora", "qalora_group_size", "runtime_config"),
    *("lora_bias", "ensure_weight_tying", "target_parameters", "lora_B_layout", *_VARIANTS),
    *("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config"),
}


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # false for NaN, too


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_blocks(value: Any) -> bool:
    """`use_bdlora`: a mapping, of which `nblocks` and two lists of names are used."""
    if not value:
        return True
    if not isinstance(value, dict) or type(value.get("nblocks", 1)) is not int:
        return False
    sides = ("target_modules_bd_a", "target_modules_bd_b")
    return value.get("nblocks", 1) > 0 and all(_is_names(value.get(side)) for side in sides)


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value > 0)


def _is_layout(value: Any) -> bool:
    return value is None or value in ("rank_major", "grouped_by_expert")


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_patterns(value: Any) -> bool:
    """Regular expression -> number."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(map(_is_number, value.values())):
        return False
    try:
        return all(re.compile(_anywhere(pattern)) for pattern in value)
    except re.error:
        return False


# What a field must be, where this reader uses it.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (_is_text, "a string"),
    "revision": (_is_text, "a string"),
    "r": (_is_number, "a number"),
    "lora_alpha": (_is_number, "a number"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "lora_bias": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "ensure_weight_tying": (_is_flag, "true or false"),
    "modules_to_save": (_is_names, "a list of names"),
    "target_parameters": (_is_names, "a list of names"),
    "use_bdlora": (_is_blocks, "a mapping with nblocks and lists of names"),
    "qalora_group_size": (_is_count, "a positive integer"),
    "lora_B_layout": (_is_layout, "rank_major or grouped_by_expert"),
    "rank_pattern": (_is_patterns, "a mapping of regular expressions to numbers"),
    "alpha_pattern": (_is_patterns, "a mapping of regular expressions to numbers"),
}


def check(config: dict[str, Any], given: str, path: Path) -> None:
    """Whether this is a config of a LoRA that weft merges.

    Raises:
        FormatError: A field is not of its type.
        Unsupported: Another kind of adapter, by name.
    """
    if not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{path} names no peft_type", "is it the config of a PEFT adapter?")
    _refuse_other_kinds(config, given)
    for field, (fits, form) in _FORMS.items():
        if field in config and not fits(config[field]):
            shown = clean(repr(config[field]))[:60]
            hint = "correct it there, or save the adapter again"
            hint = "without it the scaling is unknown" if field == "lora_alpha" else hint
            raise FormatError(f"{path}: {field} = {shown}, and must be {form}", hint)


def _refuse_other_kinds(config: dict[str, Any], given: str) -> None:
    kind = clean(config["peft_type"])
    if method := methods().get(config["peft_type"]):
        problem = getattr(method, "check", lambda config: None)(config)
        if problem:
            raise Unsupported(f"{given}: {problem.what}", problem.hint)
        return
    if kind != "LORA":
        known = ", ".join(["LORA", *methods()])
        raise Unsupported(
            f"{given} is a {kind} adapter; this release of weft merges {known}",
            "merge it with PEFT's merge_and_unload",
        )
    for field, what in _VARIANTS.items():
        if config.get(field):
            raise Unsupported(
                f"{given} uses {what}, which this release of weft does not merge",
                None if "no merged weight" in what else "merge it with PEFT's merge_and_unload",
            )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in _PLAIN_INIT:
        name = next((n for key, n in _MOVED_INIT.items() if init.startswith(key)), None)
        raise Unsupported(
            f"{given} was initialised with {name}, which moved the base weights: its ΔW does not "
            "belong to the base that it names"
            if name
            else f"{given} has init_lora_weights={clean(init)!r}, which weft does not know",
            "convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
            if name
            else None,
        )
    for field in sorted(set(config) - KNOWN):
        value = config[field]
        if (field.startswith("use_") and value is True) or (field.endswith("_config") and value):
            raise Unsupported(
                f"{given} sets {clean(field)}, a LoRA variant that this release does not know"
            )


def selection_of(config: dict[str, Any]) -> Selection | None:
    """The modules that the config names; None where it does not say, or not as PEFT would."""
    targets = _modules(config.get("target_modules"))
    excluded = _modules(config.get("exclude_modules") or [])
    layers = config.get("layers_to_transform")
    layers = [] if layers is None else layers if isinstance(layers, list) else [layers]
    if not targets or excluded is None or not all(type(layer) is int for layer in layers):
        return None
    return Selection(
        targets=targets,
        others=tuple(map(_anywhere, config.get("rank_pattern") or {})),
        excluded=excluded,
        whole=frozenset(config.get("modules_to_save") or []),
        layers=frozenset(layers),
        tied=bool(config.get("ensure_weight_tying")),
    )


def _modules(value: Any) -> Modules | None:
    if not isinstance(value, str):
        return frozenset(value) if value and _is_names(value) else frozenset()
    try:
        re.compile(value)
    except re.error:
        return None
    return None if value.lower() == "all-linear" else value  # which is a name for many


def _matching(patterns: Any, module: str) -> list[Any]:
    """Values of the patterns that PEFT would find to match `module`, in the file's order."""
    patterns = patterns or {}
    return [value for p, value in patterns.items() if re.match(_anywhere(p), module)]


def _anywhere(pattern: str) -> str:
    """A regular expression for whole paths of modules that end so."""
    return rf"(.*\.)?({pattern})$"


def ranks_of(module: str, config: Mapping[str, Any]) -> list[int]:
    """What the config says of r: one value, or those of the patterns that match."""
    return _matching(config.get("rank_pattern"), module) or [config.get("r")]


def rank_problem(module: str, A: TensorRef, config: Mapping[str, Any]) -> Problem | None:
    rank = A.shape[0]
    allowed = ranks_of(module, config)
    if rank in allowed:
        return None
    says = " or ".join(str(value) for value in allowed)
    return Problem(
        f"module {module!r} in {A.file} has rank {rank}, and {CONFIG} says r = {says}",
        f"the config and the weights are not of one save: correct r or rank_pattern in {CONFIG}",
    )


def scaling_of(module: str, rank: int, config: Mapping[str, Any]) -> float | Problem:
    """Alpha / r, or alpha / √r for rsLoRA (arXiv:2312.03732); r is that of the tensors."""
    alphas = _matching(config.get("alpha_pattern"), module) or [config.get("lora_alpha")]
    alpha = alphas[0]
    if alpha is None:
        return Problem(
            f"module {module!r}: {CONFIG} gives no lora_alpha",
            "without it the scaling is unknown: set it to what the adapter was trained with",
        )
    if any(other != alpha for other in alphas[1:]):
        says = " and ".join(str(value) for value in dict.fromkeys(alphas))
        return Problem(
            f"module {module!r} is matched by patterns of alpha_pattern that say {says}",
            "PEFT saves the patterns sorted, so the order that counted in training is lost: "
            f"leave the right one in {CONFIG}",
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
