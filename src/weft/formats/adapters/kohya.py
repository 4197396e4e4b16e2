"""A lone file as Kohya's sd-scripts and LyCORIS write it: no config, and names without dots.

Keys are a prefix, the module's path with underscores for dots, and what the tensor is:
`lora_te_layers_0_mlp_up_proj.lora_down.weight`, `lycoris_model_layers_0_mlp_up_proj.hada_w1_a`.
`alpha` is a scalar per module; s = alpha / r, and 1 where there is none. Which module is meant the
base's names tell (`weft.core.names.unflatten`). Read off files that LyCORIS 4.1.3 wrote.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from weft.core.errors import PlanError, Problem, WeftError
from weft.core.specs import Adapter, AdapterEntry, Param, Shape, TensorRef
from weft.formats.adapters._peft_config import CONFIG
from weft.formats.safetensors import Header, read_header, read_scalar

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# Ending of a key -> role, by the method.
_ROLES = {
    "lora": {"lora_down.weight": "A", "lora_up.weight": "B"},
    "loha": {f"hada_{role}": role for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {f"lokr_{r}": r for r in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_METHODS = {ending: method for method, roles in _ROLES.items() for ending in roles}
# What these tools train otherwise, by what tells it.
_OTHERS = {
    "lora_mid.weight": "LoCon with a core (lora_mid)",
    "lokr_t1": "LoKr with a core on its first factor",
    "diff": "full matrices",
    "diff_b": "full biases",
    "w_norm": "norms",
    "b_norm": "norms",
    "oft_blocks": "OFT or BOFT",
    "oft_diag": "OFT",
    "on_input": "IA3",
    "a1.weight": "GLoRA",
    "lambda_layer": "T-LoRA",
}
_PREFIX = re.compile(r"(lora|lycoris)_((te\d*|unet)_)?")

Parts = dict[str, TensorRef]


def detect(path: Path) -> bool:
    return _header(path) is not None


def _header(path: Path) -> Header | None:
    """Of the file that `path` is, or of the only one in it, if its keys are of this kind."""
    if path.is_dir() and not (path / CONFIG).exists():
        files = list(path.glob("*.safetensors"))
        path = files[0] if len(files) == 1 else path
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        header = read_header(path.absolute())
    except WeftError:  # what is wrong with it is said where it is read as something
        return None
    names = [ref.name for ref in header.tensors]
    endings = {name.partition(".")[2] for name in names}
    if endings & _METHODS.keys():
        return header
    return header if endings & _OTHERS.keys() and all(map(_PREFIX.match, names)) else None


def read(path: Path, given: str) -> Adapter:
    """Read the header of the file that is or lies in `path`, and its alphas.

    Raises:
        FormatError: The file is malformed.
        PlanError: Keys or shapes that contradict each other, or that weft does not merge; all.
    """
    header = _header(path)
    assert header is not None
    tensors = {ref.name: ref for ref in header.tensors}
    modules: dict[str, Parts] = defaultdict(dict)
    for name, ref in tensors.items():
        module, _, ending = name.partition(".")
        modules[module][ending] = ref
    prefixes = Counter(_prefix(module) for module in modules)
    entries: list[AdapterEntry] = []
    problems = _several(prefixes, header.source.path)
    for module, parts in modules.items():
        entry = _entry(module, parts)
        (problems if isinstance(entry, Problem) else entries).append(entry)  # type: ignore[arg-type]
    if problems:
        raise PlanError(f"the adapter {given}", problems)
    bare = sum("alpha" not in parts for parts in modules.values())
    note = f"{bare} modules have no alpha: it is taken to be the rank, as Kohya does"
    file = header.source.path
    return Adapter(
        given=given,
        folder=file.rpartition("/")[0],
        sources=(header.source,),
        kind=" + ".join(sorted({entry.kind.replace("dora", "lora").upper() for entry in entries})),
        entries=tuple(entries),
        tensors=tensors,
        config={},
        base_model=None,
        revision=None,
        notes=(note,) if bare else (),
        side_files=(),
        left_out=(),
        format="LyCORIS" if "lycoris_" in prefixes else "Kohya",
        flattened=True,
    )


def _prefix(module: str) -> str:
    found = _PREFIX.match(module)
    return found[0] if found else ""


def _several(prefixes: Mapping[str, int], file: str) -> list[Problem]:
    if len(prefixes) < 2:
        return []
    listed = ", ".join(f"{prefix or 'none'} ({count})" for prefix, count in prefixes.items())
    return [
        Problem(
            f"{file} changes several models, by the prefixes of its modules: {listed}",
            "a base is one model: leave the keys of that one in the file",
        )
    ]


def _entry(name: str, parts: Parts) -> AdapterEntry | Problem:
    file = next(iter(parts.values())).file
    where = f"module {name!r} in {file}"
    if other := next((what for ending, what in _OTHERS.items() if ending in parts), None):
        return Problem(
            f"{where} is {other}, which this release of weft does not merge from such files",
            "merge it with the tool that trained it",
        )
    if empty := next((ref for ref in parts.values() if ref.numel == 0), None):
        return Problem(
            f"tensor {empty.name!r} in {file} is empty, shape {list(empty.shape)}",
            "the save or the download was cut short: get the file again",
        )
    methods = {_METHODS[ending] for ending in parts if ending in _METHODS}
    unknown = [end for end in parts if end not in _METHODS and end not in ("alpha", "dora_scale")]
    if unknown or len(methods) != 1:
        return Problem(
            f"{where} has {', '.join(parts)}, which is no method that weft knows",
            f"known endings: {', '.join(_METHODS)}, alpha, dora_scale",
        )
    (method,) = methods
    tensors = {_ROLES[method][ending]: ref for ending, ref in parts.items() if ending in _METHODS}
    shapes = {role: ref.shape for role, ref in tensors.items()}
    endings = {role: ending for ending, role in _ROLES[method].items()}
    shown = ", ".join(f"{endings[role]} {list(shape)}" for role, shape in shapes.items())
    rank = _RANKS[method](shapes)
    if isinstance(rank, str):
        return Problem(f"{where} has {shown}: {rank}", "get the file again, or save it again")
    scaling = _scaling(parts.get("alpha"), rank)
    if isinstance(scaling, Problem):
        return scaling
    module = name.removeprefix(_prefix(name))
    entry = AdapterEntry(module, "weight", method, tuple(tensors.items()), scaling)
    return _with_magnitude(entry, parts["dora_scale"], where) if "dora_scale" in parts else entry


# ------------------------------------------------------------------------------ ranks and scaling


def _lora_rank(shapes: Mapping[str, Shape]) -> int | str:
    if missing := [role for role in "AB" if role not in shapes]:
        return f"lora_{'down' if missing == ['A'] else 'up'} missing"
    A, B = shapes["A"], shapes["B"]
    if len(A) < 2 or len(A) != len(B) or A[0] != B[1] or math.prod(B[2:]) != 1:
        return "they do not share a rank (the first axis of lora_down, the second of lora_up)"
    return A[0]


def _loha_rank(shapes: Mapping[str, Shape]) -> int | str:
    if missing := [r for r in ("w1_a", "w1_b", "w2_a", "w2_b") if r not in shapes]:
        return f"{', '.join(f'hada_{role}' for role in missing)} missing"
    cores = [shapes[role] for role in ("t1", "t2") if role in shapes]
    axis = 0 if cores else 1  # of `w_a`, beside a core
    ranks = {s[axis] if r.endswith("a") else s[0] for r, s in shapes.items() if len(s) == 2}
    ranks |= {rank for core in cores for rank in core[:2]}
    flat = all(len(s) == 2 for r, s in shapes.items() if r.startswith("w"))
    if len(cores) == 1 or not flat or len(ranks) != 1:
        return "they do not share a rank"
    return ranks.pop()


def _lokr_rank(shapes: Mapping[str, Shape]) -> int | str | None:
    """None where both factors are full: then there is no rank, and nothing is scaled."""
    ranks = set()
    for n in "12":
        full, parts = f"w{n}" in shapes, [f"w{n}_{x}" for x in "ab" if f"w{n}_{x}" in shapes]
        if full == bool(parts) or len(parts) == 1:
            return f"a factor is lokr_w{n}, or the product of lokr_w{n}_a and lokr_w{n}_b"
        core = f"t{n}" in shapes
        if parts:
            a, b = shapes[parts[0]], shapes[parts[1]]
            if len(a) != 2 or len(b) != 2:
                return "parts of a factor are matrices"
            ranks |= {a[0 if core else 1], b[0]}
        ranks |= set(shapes[f"t{n}"][:2]) if core else set()
    if len(ranks) > 1 or ("t2" in shapes and "w2" in shapes):
        return "they do not share a rank"
    return ranks.pop() if ranks else None


_RANKS = {"lora": _lora_rank, "loha": _loha_rank, "lokr": _lokr_rank}


def _scaling(alpha: TensorRef | None, rank: int | None) -> float | Problem:
    if alpha is None or (rank is None and alpha.numel == 1):
        return 1.0
    value = read_scalar(alpha) if alpha.numel == 1 else math.nan
    if rank is None or not math.isfinite(value):
        return Problem(
            f"tensor {alpha.name!r} in {alpha.file} has shape {list(alpha.shape)} and is no finite "
            "number",
            "the file is damaged: get it again, or save it again",
        )
    return value / rank


def _with_magnitude(entry: AdapterEntry, scale: TensorRef, where: str) -> AdapterEntry | Problem:
    """DoRA: `dora_scale` (out, 1) for norms of rows, or (1, in) for norms of columns."""
    down, up = (dict(entry.tensors).get(role) for role in "AB")
    if entry.kind != "lora" or down is None or up is None:
        return Problem(
            f"{where} is {entry.kind} with dora_scale, which this release of weft does not merge",
            "merge it with the tool that trained it",
        )
    rows, columns = up.shape[0], down.shape[1]
    if scale.numel == scale.shape[0] == rows:
        tensors = (*entry.tensors, ("magnitude", scale))
        return AdapterEntry(entry.module, "weight", "dora", tensors, entry.scaling)
    if scale.shape == (1, columns) and len(down.shape) == 2:
        # W seen as stored transposed: its columns are the outputs then, whose norms are taken.
        params: tuple[tuple[str, Param], ...] = (("factors_transposed", True), ("transposed", True))
        tensors = (("A", up), ("B", down), ("magnitude", scale))
        return AdapterEntry(entry.module, "weight", "dora", tensors, entry.scaling, params)
    return Problem(
        f"{where} has lora_down {list(down.shape)}, lora_up {list(up.shape)} and dora_scale "
        f"{list(scale.shape)}, which has neither a row per output nor a column per input",
        "the file is damaged: get it again, or save it again",
    )
