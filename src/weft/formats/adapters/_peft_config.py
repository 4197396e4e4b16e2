"""`adapter_config.json`: which fields change the merged weight, and what they say of a module."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from weft.core.errors import FormatError, Problem, Unsupported
from weft.core.units import clean
from weft.formats.adapters._peft_methods import methods

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Set
    from pathlib import Path

    from weft.core.specs import TensorRef

    Form = tuple[Callable[[Any], bool], str]

CONFIG = "adapter_config.json"

# Config fields that make the merged weight something other than W + s·BA, and what they are.
_VARIANTS = {
    "use_qalora": "QA-LoRA (its lora_A sees pooled inputs)",
    "use_bdlora": "BD-LoRA (block-diagonal factors)",
    "kasa_config": "KaSA (it truncates the base weight)",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "layer_replication (a deeper model that shares weights)",
    "target_parameters": "target_parameters (fused experts)",
    "megatron_config": "Megatron parallel layers",
    "alora_invocation_tokens": "aLoRA, which is active after some tokens only: no merged weight",
    "arrow_config": "Arrow, which routes each token to another adapter: no merged weight",
}
_PLAIN_INIT = {"gaussian", "eva", "orthogonal"}
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
    *("lora_bias", "ensure_weight_tying", *_VARIANTS),
}


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # false for NaN, too


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_patterns(value: Any) -> bool:
    """Regular expression -> number."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(map(_is_number, value.values())):
        return False
    try:
        return all(re.compile(pattern) for pattern in value)
    except re.error:
        return False


# What a value must be, and how an error says it.
TEXT = (_is_text, "a string")
FLAG = (_is_flag, "true or false")
NUMBER = (_is_number, "a number")
WHOLE = (lambda value: type(value) is int and abs(value) < 2**63, "a whole number")
PATTERNS = (_is_patterns, "a mapping of regular expressions to numbers")
COUNT = (lambda value: type(value) is int and 0 < value < 2**31, "a whole number above 0")


def one_of(*values: str) -> Form:
    return (lambda value: value in values, " or ".join(values))


# What a field must be, where this reader uses it.
_FORMS: dict[str, Form] = {
    "base_model_name_or_path": TEXT,
    "revision": TEXT,
    "r": NUMBER,
    "lora_alpha": NUMBER,
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "lora_bias": FLAG,
    "fan_in_fan_out": FLAG,
    "ensure_weight_tying": FLAG,
    "modules_to_save": (_is_names, "a list of names"),
    "rank_pattern": PATTERNS,
    "alpha_pattern": PATTERNS,
}


def check(config: dict[str, Any], given: str, path: Path) -> None:
    """Whether this is a config of an adapter that weft merges.

    Raises:
        FormatError: A field is not of its type.
        Unsupported: Another kind of adapter, by name.
    """
    if not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{path} names no peft_type", "is it the config of a PEFT adapter?")
    _check_forms(config, getattr(methods().get(config["peft_type"]), "FORMS", {}), path)
    _refuse_other_kinds(config, given)
    _check_forms(config, _FORMS, path)


def _check_forms(config: dict[str, Any], forms: Mapping[str, Form], path: Path) -> None:
    for field, (fits, form) in forms.items():
        if field in config and not fits(config[field]):
            shown = clean(repr(config[field]))[:60]
            hint = "without it the scaling is unknown" if field == "lora_alpha" else None
            raise FormatError(f"{path}: {field} = {shown}, and must be {form}", hint)


def _refuse_other_kinds(config: dict[str, Any], given: str) -> None:
    kind = clean(config["peft_type"])
    if method := methods().get(config["peft_type"]):
        problem = getattr(method, "check", lambda config: None)(config)
        if problem:
            raise Unsupported(f"{given}: {problem.what}", problem.hint)
        _refuse_unknown(config, given, KNOWN | method.FIELDS)
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
    _refuse_unknown(config, given, KNOWN)


def _refuse_unknown(config: dict[str, Any], given: str, known: Set[str]) -> None:
    kind = "LoRA" if config["peft_type"] == "LORA" else clean(config["peft_type"])
    for field in sorted(set(config) - known):
        value = config[field]
        if (field.startswith("use_") and value is True) or (field.endswith("_config") and value):
            raise Unsupported(
                f"{given} sets {clean(field)}, a variant of {kind} that this release does not know"
            )


def _matching(patterns: Any, module: str) -> list[Any]:
    """Values of the patterns that PEFT would find to match `module`, in the file's order."""
    patterns = patterns or {}
    return [value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", module)]


def rank_problem(
    module: str,
    A: TensorRef,
    config: Mapping[str, Any],
    field: str = "r",
    pattern: str = "rank_pattern",
) -> Problem | None:
    """Whether A has as many rows as the config says: its rank, or whatever `field` calls it."""
    rank = A.shape[0]
    allowed = _matching(config.get(pattern), module) or [config.get(field)]
    if rank in allowed:
        return None
    what = "rank" if field == "r" else field
    says = " or ".join(str(value) for value in allowed)
    return Problem(
        f"module {module!r} in {A.file} has {what} {rank}, and {CONFIG} says {field} = {says}",
        f"the config and the weights are not of one save: correct {field} or {pattern} in {CONFIG}",
    )


def scaling_of(module: str, rank: int, config: dict[str, Any]) -> float | Problem:
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
