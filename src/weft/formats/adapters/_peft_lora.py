"""The key grammar of PEFT's LoRA: what the factors of a module are called, and what they change."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry, Param, TensorRef
from weft.formats.adapters import _peft_experts as _experts
from weft.formats.adapters import _peft_merged as _merged
from weft.formats.adapters._peft_config import CONFIG, rank_problem, scaling_of
from weft.formats.adapters._peft_methods._tokens import token_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# suffix of a key -> role of the tensor
SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "B_bias",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_diag": "diag",
    ".token_adapter.trainable_tokens_delta": "rows",
}
# What some variants need for training, and nothing afterwards: field of the config -> in the key.
_FOR_TRAINING = {
    "monteclora_config": ".lora_monteclora_sampler.",
    "velora_config": ".lora_velora_embed",
}
# Variants of which a module has one.
_ONE_OF = ("use_dora", "kasa_config", "use_bdlora", "use_qalora", *_FOR_TRAINING)
# How PEFT names what a wrapper wraps, inside another one: the projection of attention's output.
_OUT_PROJ = ".base_layer.out_proj"

Roles = dict[str, TensorRef]
Read = tuple[list[AdapterEntry], list[Problem]]


def read(modules: Mapping[str, Roles], config: Mapping[str, Any]) -> Read:
    """The entries of all modules (path -> role -> tensor); together they use every tensor."""
    entries: list[AdapterEntry] = []
    problems: list[Problem] = []
    levels: dict[str, list[Roles]] = defaultdict(list)  # of one module, outermost first
    for path in sorted(modules, key=len):
        levels[_unwrapped(path)].append(modules[path])
    # nn.MultiheadAttention: only there is a layer named inside what another one wraps.
    attention = {path.removesuffix(_OUT_PROJ) for path in modules if path.endswith(_OUT_PROJ)}
    for path, roles in modules.items():
        module = _unwrapped(path)
        if path in attention:
            found, wrong = _in_proj(path, roles, config)
        elif path.endswith(_OUT_PROJ) and path.removesuffix(_OUT_PROJ) in modules:
            found, wrong = _module(path.replace(_OUT_PROJ, ".out_proj"), roles, config)
        elif names := _experts.parameters(module, config):
            sets = levels.pop(module, None)
            if sets is None:
                continue  # done, with the set of factors that came first
            found, wrong = _parameters(module, sets[::-1], names, config)
        elif path != module or ".base_layer." in path:
            found, wrong = [], [_nested(ref) for ref in roles.values()]
        else:
            found, wrong = _module(path, roles, config)
        entries += found
        problems += wrong
    return entries, problems


def only_for_training(path: str, config: Mapping[str, Any]) -> bool:
    """Whether the tensor has no part in the merged weight."""
    return any(config.get(field) and part in path for field, part in _FOR_TRAINING.items())


def _unwrapped(path: str) -> str:
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def _parameters(
    module: str, levels: Sequence[Roles], names: Sequence[str], config: Mapping[str, Any]
) -> Read:
    """The sets of factors of a module of which `target_parameters` names parameters, or may."""
    if len(levels) == 1 and not set(levels[0]) <= {"A", "B"}:
        return _module(module, levels[0], config)
    found, wrong = _experts.readings(module, levels, names, config)
    if len(levels) == 1:  # may as well be an ordinary layer: a bare name fits every module
        plain, problems = _module(module, levels[0], config)
        if not found:
            return (plain, []) if plain else ([], wrong or problems)
        if plain:
            others = (replace(found[0], alternatives=()), *found[0].alternatives)
            found = [replace(plain[0], alternatives=others)]
    return found, wrong


def notes(
    entries: Sequence[AdapterEntry], tensors: Iterable[str], config: Mapping[str, Any]
) -> list[str]:
    """What is merged otherwise than a user of PEFT may expect."""
    found = []
    if any(entry.parameter == "in_proj_weight" for entry in entries):
        found.append(
            "nn.MultiheadAttention: ΔW of out_proj is added once, as LoRA says; PEFT (0.21) adds "
            "it twice, when it merges and when it trains"
        )
    if unused := sum(only_for_training(name, config) for name in tensors):
        found.append(f"{unused} tensors serve training alone and have no part in the merged weight")
    if any(entry.kind == "qalora" for entry in entries):
        found.append("QA-LoRA is trained on a quantised base: another one gives other results")
    return found


def _nested(ref: TensorRef) -> Problem:
    return Problem(
        f"tensor {ref.name!r} in {ref.file} wraps a layer twice, and {CONFIG} names no "
        "target_parameters that would do so",
        "the config and the weights are not of one save",
    )


def _in_proj(module: str, roles: Roles, config: Mapping[str, Any]) -> Read:
    """Queries, keys and values of nn.MultiheadAttention, which are one parameter."""
    if bias := roles.get("B_bias"):
        return [], [
            Problem(
                f"tensor {bias.name!r} in {bias.file} is a bias of lora_B for the in_proj of "
                "nn.MultiheadAttention, which PEFT trains and uses nowhere",
                "train it with lora_bias=False",
            )
        ]
    return _module(module, roles, config, "in_proj_weight")


def _module(
    module: str, roles: Roles, config: Mapping[str, Any], parameter: str = "weight"
) -> Read:
    entries: list[AdapterEntry] = []
    problems: list[Problem] = []
    roles = dict(roles)
    if rows := roles.pop("rows", None):
        entry = token_rows(module, rows, config, "trainable_token_indices")
        (problems if isinstance(entry, Problem) else entries).append(entry)  # type: ignore[arg-type]
    if not roles:
        return entries, problems
    if config.get("enable_lora"):
        merged = _merged.entry(module, roles, config)
        (problems if isinstance(merged, Problem) else entries).append(merged)  # type: ignore[arg-type]
        return entries, problems
    factors = _factors(module, roles)
    if isinstance(factors, Problem):
        return entries, [*problems, factors]
    A, B = factors
    variant = _variant(module, roles, config)
    if isinstance(variant, Problem):
        return entries, [*problems, variant]
    kind, params = variant
    wrong = _factor_shapes(module, A, B, dict(params)) or rank_problem(
        module, A.file, A.shape[0], config
    )
    scaling = scaling_of(module, A.shape[0], config) if not wrong else Problem("")
    if wrong or isinstance(scaling, Problem):
        problems.append(wrong or scaling)  # type: ignore[arg-type]
        return entries, problems
    extra = tuple((role, roles[role]) for role in ("magnitude", "diag") if role in roles)
    tensors = (("A", A), ("B", B), *extra)
    entries.append(AdapterEntry(module, parameter, kind, tensors, scaling, params))
    if bias := roles.get("B_bias"):
        entries.append(AdapterEntry(module, "bias", "lora_bias", (("bias", bias),), scaling))
    return entries, problems


def _variant(
    module: str, roles: Roles, config: Mapping[str, Any]
) -> tuple[str, tuple[tuple[str, Param], ...]] | Problem:
    """The kind of delta that the module has, and its params."""
    file = next(iter(roles.values())).file
    for role, name, field in (
        ("magnitude", "lora_magnitude_vector", "use_dora"),
        ("diag", "lora_diag", "kasa_config"),
    ):
        if bool(config.get(field)) != (role in roles):
            said = bool(config.get(field)) if field == "use_dora" else config.get(field)
            return Problem(
                f"module {module!r} in {file} has {'a' if role in roles else 'no'} {name}, and "
                f"{field} is {said}",
                "the config and the weights are not of one save",
            )
    if len(several := [field for field in _ONE_OF if config.get(field)]) > 1:
        return Problem(
            f"{CONFIG} sets {' and '.join(several)}, which PEFT does not combine",
            "the config was edited, or is of another tool",
        )
    if "diag" in roles:
        return "kasa", ()
    if config.get("use_qalora"):
        return "qalora", (("group", int(config.get("qalora_group_size") or 16)),)
    if blocks := config.get("use_bdlora"):
        return _block_diagonal(module, file, blocks)
    embedding: tuple[tuple[str, Param], ...] = (("transposed", True),)
    return "dora" if "magnitude" in roles else "lora", embedding if "embedding_A" in roles else ()


def _block_diagonal(
    module: str, file: str, config: Mapping[str, Any]
) -> tuple[str, tuple[tuple[str, Param], ...]] | Problem:
    """Which factor of BD-LoRA is block-diagonal: PEFT looks for parts of the module's last name."""
    last = module.rpartition(".")[2]
    sides = [
        side
        for side in "AB"
        if any(part in last for part in config.get(f"target_modules_bd_{side.lower()}") or [])
    ]
    if len(sides) > 1:
        return Problem(
            f"module {module!r} in {file} is named by target_modules_bd_a and by "
            f"target_modules_bd_b in {CONFIG}"
        )
    if not sides:
        return "lora", ()
    return "bdlora", (("blocks", int(config.get("nblocks") or 1)), ("side", sides[0]))


def _factors(module: str, roles: Roles) -> tuple[TensorRef, TensorRef] | Problem:
    """A and B, of a matrix or of an embedding."""
    file = next(iter(roles.values())).file
    embedding = "embedding_A" in roles or "embedding_B" in roles
    wanted = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if missing := [role for role in wanted if role not in roles]:
        names = " and ".join(f"lora_{role}" for role in missing)
        there = ", ".join(ref.name for ref in roles.values())
        return Problem(
            f"module {module!r} in {file} has {there} and lacks {names}",
            "the file lost tensors: save or download the adapter again",
        )
    if embedding and {"A", "B", "B_bias"} & set(roles):
        return Problem(f"module {module!r} in {file} has both kinds of factors")
    return roles[wanted[0]], roles[wanted[1]]


def _factor_shapes(
    module: str, A: TensorRef, B: TensorRef, params: Mapping[str, Param]
) -> Problem | None:
    """A (r, in) and B (out, r); for a convolution A (r, in, kernel…) and B (out, r, 1…)."""
    # Of a B that is block-diagonal only the blocks are stored.
    blocks = params["blocks"] if params.get("side") == "B" else 1
    shapes = f"lora_A {list(A.shape)}, lora_B {list(B.shape)}"
    convolution = 2 < len(A.shape) == len(B.shape) and set(B.shape[2:]) == {1}
    if not convolution and (len(A.shape) != 2 or len(B.shape) != 2):
        return Problem(
            f"module {module!r} in {A.file}: {shapes} are not two matrices",
            "flat factors are what FSDP leaves when it saves without gathering: save it again",
        )
    if convolution and A.shape[0] > B.shape[1] and A.shape[0] % B.shape[1] == 0:
        return Problem(
            f"module {module!r} in {A.file} is a convolution of {A.shape[0] // B.shape[1]} groups "
            f"({shapes})",
            "its lora_A reads all channels and its weight only those of a group: no merged weight "
            "does the same",
        )
    if A.shape[0] != B.shape[1] * blocks:
        return Problem(
            f"module {module!r} in {A.file}: {shapes} do not share a rank "
            f"({A.shape[0]} rows of A, {B.shape[1]} columns of B)",
            "one of the two is of another save: take both from the same one",
        )
    return None
