"""`target_parameters`: LoRA on parameters that are no module's `weight`, such as fused experts.

The name of the parameter is not in the key. Where several parameters of a module are adapted, the
wrappers are nested, each with `.base_layer` in the key: the one registered first is innermost. So
an entry has several readings, of which the shapes in the base leave one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry, Param, TensorRef
from weft.formats.adapters._peft_config import CONFIG, ranks_of, scaling_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Variants that PEFT has for layers alone.
_NOT_FOR_PARAMETERS = (
    *("use_dora", "lora_bias", "kasa_config", "use_bdlora", "use_qalora", "velora_config"),
    "monteclora_config",
)


def parameters(module: str, config: Mapping[str, Any]) -> list[str]:
    """The parameters of `module` that `target_parameters` may name."""
    found = []
    for target in config.get("target_parameters") or []:
        owner, _, parameter = target.rpartition(".")
        if not owner or module == owner or module.endswith("." + owner):
            found.append(parameter)
    return list(dict.fromkeys(found))


def readings(
    module: str,
    levels: Sequence[Mapping[str, TensorRef]],
    names: Sequence[str],
    config: Mapping[str, Any],
) -> tuple[list[AdapterEntry], list[Problem]]:
    """One entry for each set of factors of a module, with what else it could belong to.

    Args:
        module: Path without any `base_layer`.
        levels: The sets of A (experts · r, in) and B (out, r · experts), innermost first.
        names: What `target_parameters` may mean by it.
        config: `adapter_config.json`.
    """
    entries: list[AdapterEntry] = []
    problems: list[Problem] = []
    for level, roles in enumerate(levels):
        fitting, wrong = _readings(module, level, roles, names, config)
        if fitting:
            first, *others = fitting
            entries.append(replace(first, alternatives=tuple(others)))
        else:
            problems += wrong[:1]
    return entries, problems


def _readings(
    module: str,
    level: int,
    roles: Mapping[str, TensorRef],
    names: Sequence[str],
    config: Mapping[str, Any],
) -> tuple[list[AdapterEntry], list[Problem]]:
    if problem := _malformed(module, roles) or _variant(module, roles, config):
        return [], [problem]
    A, B = roles["A"], roles["B"]
    found: list[AdapterEntry] = []
    problems: list[Problem] = []
    for name in names:
        ranks = ranks_of(f"{module}.{name}", config)
        rank = next((r for r in ranks if type(r) is int and r > 0 and A.shape[0] % r == 0), None)
        if rank is None:
            says = " or ".join(map(str, ranks))
            what = (
                f"lora_A of {module!r} in {A.file} has {A.shape[0]} rows, and {CONFIG} says r = "
                f"{says} for each expert of {name}"
            )
            problems.append(Problem(what, f"correct r or rank_pattern in {CONFIG}"))
            continue
        scaling = scaling_of(f"{module}.{name}", rank, config)
        if isinstance(scaling, Problem):
            problems.append(scaling)
            continue
        params: tuple[tuple[str, Param], ...] = (("experts", A.shape[0] // rank), ("level", level))
        tensors = (("A", A), ("B", B))
        found.append(AdapterEntry(module, name, "lora_experts", tensors, scaling, params))
    return found, problems


def _variant(
    module: str, roles: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> Problem | None:
    found = next((field for field in _NOT_FOR_PARAMETERS if config.get(field)), None)
    if not found:
        return None
    return Problem(
        f"module {module!r} in {roles['A'].file} may be one of target_parameters, which PEFT does "
        f"not combine with {found}",
        "the config and the weights are not of one save",
    )


def _malformed(module: str, roles: Mapping[str, TensorRef]) -> Problem | None:
    file = next(iter(roles.values())).file
    there = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in roles.values())
    if set(roles) != {"A", "B"}:
        return Problem(
            f"module {module!r} in {file} has {there}, and target_parameters has lora_A and lora_B",
            "the config and the weights are not of one save",
        )
    A, B = roles["A"].shape, roles["B"].shape
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        return Problem(
            f"module {module!r} in {file}: {there} are not two matrices that share experts · r",
            "flat factors are what FSDP leaves when it saves without gathering: save it again",
        )
    return None
