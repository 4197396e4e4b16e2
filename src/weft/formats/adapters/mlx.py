"""mlx-lm's adapter folder: `adapter_config.json` and `adapters.safetensors`.

`lora_a` (in, r) and `lora_b` (r, out) make ΔW = scale · (lora_a @ lora_b)ᵀ; in an embedding, whose
`lora_a` has a row per token, ΔW = scale · lora_a @ lora_b. `m` is DoRA's magnitude. A run with
`fine_tune_type: full` leaves whole tensors. Read off files that mlx-lm 0.32.2 wrote, and off the
sources of 0.10 to 0.32.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from weft.core.errors import FormatError, NotFound, PlanError, Problem, Unsupported
from weft.core.specs import Adapter, AdapterEntry, Param, TensorRef
from weft.core.units import clean
from weft.formats.adapters._config import written_by_mlx
from weft.formats.adapters._peft_config import CONFIG
from weft.formats.checkpoint import read_header, read_json_source
from weft.formats.side_files import beside_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_FILE = "adapters.safetensors"
# The last one, and that of iteration 100: `0000100_adapters.safetensors`.
_FILES = re.compile(r"(\d+_)?adapters\.safetensors")
_ROLES = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}
_KINDS = ("lora", "dora", "full")


def detect(path: Path) -> bool:
    return written_by_mlx(_folder(path))


def _folder(path: Path) -> Path:
    named = path.name == CONFIG or _FILES.fullmatch(path.name)
    return path.parent if named and path.is_file() else path


def read(path: Path, given: str) -> Adapter:
    """Read the headers and the config of mlx-lm's adapter in `path`.

    Raises:
        NotFound: The config is there and the weights are not.
        FormatError: A file is malformed.
        Unsupported: A way of training that weft does not know.
        PlanError: Keys or shapes that contradict each other or the config; all of them.
    """
    folder = _folder(path.absolute())
    config, source = read_json_source(folder / CONFIG)
    header = read_header(_weights(path, folder))
    tensors = {ref.name: ref for ref in header.tensors}
    if not tensors:
        raise FormatError(f"{header.source.path} holds no tensors")
    kind = _kind(config, given)
    empty = [_empty(ref) for ref in header.tensors if ref.numel == 0]
    found = {name: ref for name, ref in tensors.items() if ref.numel}
    entries, problems = _whole(found) if kind == "full" else _low_rank(found, config, kind)
    if empty or problems:
        raise PlanError(f"the adapter {given}", [*empty, *problems])
    kept, left = beside_adapter(folder)
    base = config.get("model")
    return Adapter(
        given=given,
        folder=str(folder),
        sources=(header.source, source),
        kind=kind.upper(),
        entries=tuple(entries),
        tensors=tensors,
        config=config,
        base_model=clean(base) if isinstance(base, str) and base else None,
        revision=None,
        notes=(),
        side_files=tuple(kept),
        left_out=tuple(left),
        format="mlx-lm",
    )


def _weights(path: Path, folder: Path) -> Path:
    if _FILES.fullmatch(path.name):
        return folder / path.name
    if (folder / _FILE).is_file():
        return folder / _FILE
    saves = sorted(file.name for file in folder.iterdir() if _FILES.fullmatch(file.name))
    raise NotFound(
        f"{folder} has {CONFIG} and no {_FILE}",
        f"the training did not end; name the save that is meant: {saves[-1]}"
        if saves
        else "finish the download, or the training that was cut short",
    )


def _kind(config: Mapping[str, Any], given: str) -> str:
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") is True else "lora")
    if kind not in _KINDS:
        raise Unsupported(
            f"{given} has fine_tune_type {clean(repr(kind))[:60]}; this release of weft merges "
            f"{', '.join(_KINDS)} of mlx-lm",
            "fuse it with mlx_lm.fuse",
        )
    return str(kind)


def _empty(ref: TensorRef) -> Problem:
    return Problem(
        f"tensor {ref.name!r} in {ref.file} is empty, shape {list(ref.shape)}",
        "the save or the download was cut short: get the file again",
    )


def _whole(tensors: Mapping[str, TensorRef]) -> tuple[list[AdapterEntry], list[Problem]]:
    factors = [ref for name, ref in tensors.items() if _split(name)[1] in ("A", "B")]
    problems = [
        Problem(
            f"tensor {ref.name!r} in {ref.file} is a factor, and {CONFIG} says "
            "fine_tune_type = full",
            "the config and the weights are not of one run",
        )
        for ref in factors
    ]
    split = {name: name.rpartition(".") for name in tensors}
    return [
        AdapterEntry(module, parameter, "replace", (("value", tensors[name]),))
        for name, (module, _, parameter) in split.items()
    ], problems


def _split(key: str) -> tuple[str, str | None]:
    module, _, leaf = key.rpartition(".")
    return module, _ROLES.get(leaf)


def _low_rank(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any], kind: str
) -> tuple[list[AdapterEntry], list[Problem]]:
    modules: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    problems = []
    for key, ref in tensors.items():
        module, role = _split(key)
        if role and module:
            modules[module][role] = ref
        else:
            problems.append(
                Problem(
                    f"tensor {key!r} in {ref.file} has no ending that weft knows",
                    f"known endings of mlx-lm: {', '.join(f'.{leaf}' for leaf in _ROLES)}",
                )
            )
    scale = _scale(config)
    if isinstance(scale, Problem):
        return [], [*problems, scale]
    entries = []
    for module, roles in modules.items():
        problem = _problem(module, roles, config, kind)
        if problem:
            problems.append(problem)
        else:
            entries.append(_entry(module, roles, scale, kind))
    return entries, problems


def _scale(config: Mapping[str, Any]) -> float | Problem:
    """What the factors' product is multiplied by.

    Up to 0.14.1 that was scale · alpha / rank. Later releases left `alpha` in their default config
    and took no notice of it; those from 0.19 on are known by `num_layers`, those before 0.13 by the
    lack of `use_dora`.
    """
    given = config.get("lora_parameters")
    numbers = given if isinstance(given, dict) else {}
    scale, alpha, rank = (numbers.get(name) for name in ("scale", "alpha", "rank"))
    for name, value, fits in (("scale", scale, _is_number(scale)), ("rank", rank, _is_rank(rank))):
        if not fits:
            shown = f"{name} = {clean(repr(value))[:60]}"
            return Problem(
                f"{CONFIG}: lora_parameters has {shown}, and it must be a number",
                "without it the scaling is unknown: set it to what the adapter was trained with",
            )
    if not _is_number(alpha) or alpha == rank or "num_layers" in config:
        return float(scale)  # type: ignore[arg-type]
    scaled = float(scale * alpha / rank)  # type: ignore[operator]
    if "use_dora" not in config:
        return scaled
    return Problem(
        f"{CONFIG}: lora_parameters has scale = {scale}, alpha = {alpha} and rank = {rank}; mlx-lm "
        f"0.13 to 0.14.1 trained that with {scaled:g}, and 0.14.2 to 0.18 with {scale:g}",
        f"take alpha out of {CONFIG}; and, if it was mlx-lm before 0.14.2, set scale to {scaled:g}",
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # false for NaN, too


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _problem(
    module: str, roles: Mapping[str, TensorRef], config: Mapping[str, Any], kind: str
) -> Problem | None:
    """What is wrong with the tensors of one module."""
    file = next(iter(roles.values())).file
    leaves = {role: leaf for leaf, role in _ROLES.items()}
    wanted = ("A", "B", "magnitude") if kind == "dora" else ("A", "B")
    shapes = ", ".join(f"{leaves[role]} {list(ref.shape)}" for role, ref in roles.items())
    if missing := [leaves[role] for role in wanted if role not in roles]:
        return Problem(
            f"module {module!r} in {file} has {shapes} and lacks {' and '.join(missing)}",
            "the file lost tensors: save or download the adapter again",
        )
    if "magnitude" in roles and kind != "dora":
        return Problem(
            f"module {module!r} in {file} has a magnitude m, and {CONFIG} says it is no DoRA",
            "the config and the weights are not of one run",
        )
    A, B = roles["A"].shape, roles["B"].shape
    if len(A) == len(B) == 3:
        return Problem(
            f"module {module!r} in {file} is LoRA on a stack of experts or heads ({shapes})",
            "this release of weft does not merge those of mlx-lm: use mlx_lm.fuse",
        )
    if len(A) != 2 or len(B) != 2 or A[1] != B[0]:
        return Problem(
            f"module {module!r} in {file}: {shapes} are not two matrices that share a rank "
            "(columns of lora_a, rows of lora_b)",
            "the file is damaged: save or download the adapter again",
        )
    rank = config["lora_parameters"]["rank"]
    if A[1] != rank:
        return Problem(
            f"module {module!r} in {file} has rank {A[1]}, and {CONFIG} says rank = {rank}",
            f"the config and the weights are not of one run: correct rank in {CONFIG}",
        )
    if kind == "dora" and roles["magnitude"].shape not in ((A[0],), (B[1],)):
        return Problem(
            f"module {module!r} in {file}: {shapes}; m has neither the columns of lora_b nor the "
            "rows of lora_a (an embedding)",
            "the file is damaged: save or download the adapter again",
        )
    return None


def _entry(module: str, roles: Mapping[str, TensorRef], scale: float, kind: str) -> AdapterEntry:
    params: dict[str, Param] = {"factors_transposed": True}
    A, B = roles["A"], roles["B"]
    tensors = [("A", A), ("B", B)]
    if "magnitude" in roles:
        tensors.append(("magnitude", roles["magnitude"]))
        if roles["magnitude"].shape != (B.shape[1],):
            # One magnitude per token: the table is a matrix with tokens as outputs, its rows normed
            # (PEFT's has one per column).
            tensors[:2] = [("A", B), ("B", A)]
            params = {"transposed": False}
    if _is_embedding(module):
        params["both_ends"] = True
    return AdapterEntry(
        module, "weight", kind, tuple(tensors), scale, tuple(sorted(params.items()))
    )


def _is_embedding(module: str) -> bool:
    """Where it is tied, the model uses the one adapted table at its output, too."""
    leaf = module.rpartition(".")[2]
    return "embed" in leaf or leaf == "wte"
