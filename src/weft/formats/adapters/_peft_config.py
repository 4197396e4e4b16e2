"""`adapter_config.json`: which fields change the merged weight, and what they say of a module."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from weft.core.errors import FormatError, Problem, Unsupported
from weft.core.selection import Modules, Selection
from weft.core.units import clean
from weft.formats.adapters._peft_methods import methods
from weft.formats.adapters._peft_methods._forms import (
    FLAG,
    NAMES,
    NUMBER,
    PATTERNS,
    TEXT,
    anywhere,
    is_names,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weft.formats.adapters._peft_methods._forms import Form

CONFIG = "adapter_config.json"

# Config fields that make the merged weight something other than W + s·BA, and what they are.
VARIANTS = {
    "megatron_config": "Megatron parallel layers",
    "alora_invocation_tokens": "aLoRA, which is active after some tokens only: no merged weight",
    "arrow_config": "Arrow, which routes each token to another adapter: no merged weight",
}
_PROMPTS = "it learns what stands before the input, and no weight"
# peft_type -> why its file and a base do not make one merged weight.
NOT_MERGED = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT"), _PROMPTS),
    **dict.fromkeys(("PREFIX_TUNING", "CARTRIDGE", "ADAPTION_PROMPT"), _PROMPTS),
    "XLORA": "it mixes its LoRAs anew for each token",
    "LILY": "a router mixes its factors anew for each input",
    "POLY": "it mixes its LoRAs by the task that comes with each input",
    "SHADOW": "a second network runs beside the model and adds to what the layers are given",
    "PSOFT": "its directions are not in the file: PEFT takes them from an SVD of the base, whose "
    "signs depend on the machine, and what was trained depends on them",
    "ADAMSS": "which rows of a weight belong to which of its parts is not in the file: PEFT finds "
    "them by a random projection and k-means",
}
_PLAIN_INIT = {"gaussian", "eva", "orthogonal", "mica"}
_MOVED_INIT = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "loftq": "LoftQ",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
}
# Fields of LoRA's configs that PEFT 0.21 has no more, or never had.
FOREIGN = {
    *("enable_lora", "merge_weights"),  # before 0.3
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "swift_type"),  # of ms-swift, for training
    "lora_B_layout",  # of Unsloth
}
KNOWN = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "use_dora", "qalora_group_size", "runtime_config"),
    *("lora_bias", "ensure_weight_tying", "target_parameters", *VARIANTS, *FOREIGN),
    "layer_replication",
    *("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config"),
}


def _is_blocks(value: Any) -> bool:
    """`use_bdlora`: a mapping, of which `nblocks` and two lists of names are used."""
    if not value:
        return True
    if not isinstance(value, dict) or type(value.get("nblocks", 1)) is not int:
        return False
    sides = ("target_modules_bd_a", "target_modules_bd_b")
    return value.get("nblocks", 1) > 0 and all(is_names(value.get(side)) for side in sides)


def _is_group(value: Any) -> bool:
    return value is None or (type(value) is int and value > 0)


def _is_ranges(value: Any) -> bool:
    """`layer_replication`: pairs of a first layer and the one behind the last."""
    if not value:
        return True
    pairs = isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(n) is int for n in pair)
        and 0 <= pair[0] < pair[1]
        for pair in value
    )
    return pairs and sum(stop - start for start, stop in value) < 10_000


def _is_flags(value: Any) -> bool:
    return value is None or (isinstance(value, list) and {*map(type, value)} <= {bool})


def _is_layout(value: Any) -> bool:
    return value is None or value in ("rank_major", "grouped_by_expert")


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
    "modules_to_save": NAMES,
    "target_parameters": NAMES,
    "use_bdlora": (_is_blocks, "a mapping with nblocks and lists of names"),
    "qalora_group_size": (_is_group, "a positive integer"),
    "layer_replication": (_is_ranges, "a list of pairs such as [0, 4]"),
    "lora_B_layout": (_is_layout, "rank_major or grouped_by_expert"),
    "rank_pattern": PATTERNS,
    "alpha_pattern": PATTERNS,
    "enable_lora": (_is_flags, "a list of true and false"),
}


def check(config: dict[str, Any], given: str, path: Path) -> None:
    """Whether this is a config of an adapter that weft merges.

    Raises:
        FormatError: A field is not of its type.
        Unsupported: Another kind of adapter, by name.
    """
    if not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{path} names no peft_type", "is it the config of a PEFT adapter?")
    _refuse_other_kinds(config, given)
    own = getattr(methods().get(config["peft_type"]), "FORMS", {})
    for field, (fits, form) in {**_FORMS, **own}.items():
        if (field in config or field in own) and not fits(config.get(field)):
            shown = clean(repr(config.get(field)))[:60]
            hint = "correct it there, or save the adapter again"
            hint = "without it the scaling is unknown" if field.endswith("alpha") else hint
            raise FormatError(f"{path}: {field} = {shown}, and must be {form}", hint)


def _refuse_other_kinds(config: dict[str, Any], given: str) -> None:
    kind = clean(config["peft_type"])
    if method := methods().get(config["peft_type"]):
        problem = getattr(method, "check", lambda config: None)(config)
        if problem:
            raise Unsupported(f"{given}: {problem.what}", problem.hint)
        _refuse_unknown(config, given, KNOWN | method.FIELDS)
        return
    if reason := NOT_MERGED.get(config["peft_type"]):
        raise Unsupported(f"{given} is a {kind} adapter, which cannot be merged: {reason}")
    if kind != "LORA":
        known = ", ".join(["LORA", *methods()])
        raise Unsupported(
            f"{given} is a {kind} adapter; this release of weft merges {known}",
            "merge it with PEFT's merge_and_unload",
        )
    for field, what in VARIANTS.items():
        if config.get(field):
            raise Unsupported(
                f"{given} uses {what}, which this release of weft does not merge",
                None if "no merged weight" in what else "merge it with PEFT's merge_and_unload",
            )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in _PLAIN_INIT and moved_base(config) is None:
        raise Unsupported(
            f"{given} has init_lora_weights={clean(init)!r}, which weft does not know"
        )
    _refuse_unknown(config, given, KNOWN)


def _refuse_unknown(config: dict[str, Any], given: str, known: set[str]) -> None:
    kind = "LoRA" if config["peft_type"] == "LORA" else clean(config["peft_type"])
    for field in sorted(set(config) - known):
        value = config[field]
        if (field.startswith("use_") and value is True) or (field.endswith("_config") and value):
            raise Unsupported(
                f"{given} sets {clean(field)}, a variant of {kind} that this release does not know",
                "a newer weft may know it; false, if it was not trained so",
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
        others=(
            *map(anywhere, config.get("rank_pattern") or {}),
            *(anywhere(_owner(target)) for target in config.get("target_parameters") or []),
        ),
        excluded=excluded,
        whole=frozenset(config.get("modules_to_save") or []),
        layers=frozenset(layers),
        tied=bool(config.get("ensure_weight_tying")),
    )


def moved_base(config: Mapping[str, Any]) -> str | None:
    """The initialisation that took its factors off the base weights, by name, if one did."""
    init = config.get("init_lora_weights")
    if not isinstance(init, str):
        return None
    return next((name for key, name in _MOVED_INIT.items() if init.lower().startswith(key)), None)


def trains_in_place(config: Mapping[str, Any]) -> bool:
    """Whether PEFT 0.1 or 0.2 wrote it, which trained `modules_to_save` in the model, not a copy.

    No release says its number before 0.18; `merge_weights` went with 0.3, where
    `init_lora_weights` came. (ms-swift has the former to this day, beside the latter.)
    """
    return "merge_weights" in config and "init_lora_weights" not in config


def trains_originals(config: Mapping[str, Any]) -> bool:
    """Whether PEFT 0.3 to 0.5 wrote it, which left what `modules_to_save` copies trainable.

    `rank_pattern` came to LoRA's configs with 0.6, which freezes it.
    """
    lora = config.get("peft_type") == "LORA" and "init_lora_weights" in config
    return lora and "rank_pattern" not in config


def _owner(parameter: str) -> str:
    """A regular expression for the module that has the parameter; a bare name fits any."""
    module = parameter.rpartition(".")[0]
    return re.escape(module) if module else ".*"


def _modules(value: Any) -> Modules | None:
    if not isinstance(value, str):
        return frozenset(value) if value and is_names(value) else frozenset()
    try:
        re.compile(value)
    except re.error:
        return None
    return None if value.lower() == "all-linear" else value  # which is a name for many


def matching(patterns: Any, module: str) -> list[Any]:
    """Values of the patterns that PEFT would find to match `module`, in the file's order."""
    patterns = patterns or {}
    return [value for p, value in patterns.items() if re.match(anywhere(p), module)]


def ranks_of(
    module: str, config: Mapping[str, Any], field: str = "r", pattern: str = "rank_pattern"
) -> list[int]:
    """What the config says of r: one value, or those of the patterns that match."""
    return matching(config.get(pattern), module) or [config.get(field)]


def rank_problem(
    module: str,
    file: str,
    rank: int,
    config: Mapping[str, Any],
    field: str = "r",
    pattern: str = "rank_pattern",
) -> Problem | None:
    """Whether the rank that the tensors have is one that the config gives the module.

    `field` and `pattern` are what the config calls it, where it is a rank by another name.
    """
    allowed = ranks_of(module, config, field, pattern)
    if rank in allowed:
        return None
    what = "rank" if field == "r" else field
    says = " or ".join(str(value) for value in allowed)
    return Problem(
        f"module {module!r} in {file} has {what} {rank}, and {CONFIG} says {field} = {says}",
        f"the config and the weights are not of one save: correct {field} or {pattern} in {CONFIG}",
    )


def scaling_of(
    module: str, rank: int, config: Mapping[str, Any], field: str = "lora_alpha"
) -> float | Problem:
    """Alpha / r, or alpha / √r for rsLoRA (arXiv:2312.03732); r is that of the tensors.

    `field` is what the config calls alpha.
    """
    alphas = matching(config.get("alpha_pattern"), module) or [config.get(field)]
    alpha = alphas[0]
    if alpha is None:
        return Problem(
            f"module {module!r}: {CONFIG} gives no {field}",
            "without it the scaling is unknown: set it to what the adapter was trained with",
        )
    if any(other != alpha for other in alphas[1:]):
        return undecided(module, "alpha_pattern", alphas)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def undecided(module: str, field: str, values: list[Any]) -> Problem:
    """Several patterns match one module: PEFT took the first, in an order that it did not save."""
    says = " and ".join(str(value) for value in dict.fromkeys(values))
    return Problem(
        f"module {module!r} is matched by patterns of {field} that say {says}",
        "PEFT saves the patterns sorted, so the order that counted in training is lost: "
        f"leave the right one in {CONFIG}",
    )
