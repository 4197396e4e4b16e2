"""torchtune's adapters as it trains them: `adapter_model.pt`, before 0.5 `adapter_0.pt`.

Names are torchtune's own, and the rows of q and k may lie in its rotary order; which base has
those so is said in `weft.plan._layouts`. `adapter_config.json` is PEFT's.

torchtune writes a copy in PEFT's form beside it. Where both are there this one is read: the copy
has no `use_dora`, leaves DoRA's magnitudes of q and k in the other order, and orders the rows of
Qwen2 anew, which were right. Read off files and sources of torchtune 0.6.1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from weft.core.errors import FormatError, NotFound, PlanError, Problem
from weft.core.specs import Adapter, AdapterEntry, Param, TensorRef
from weft.core.units import clean
from weft.formats.adapters._config import torchtune_files
from weft.formats.adapters._peft_config import CONFIG, check, rank_problem, scaling_of
from weft.formats.checkpoint import read_header, read_json_source
from weft.formats.side_files import beside_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_ROLES = {"lora_a.weight": "A", "lora_b.weight": "B", "magnitude": "magnitude"}
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


def detect(path: Path) -> bool:
    return bool(torchtune_files(path))


def read(path: Path, given: str) -> Adapter:
    """Read where the tensors of torchtune's adapter in `path` lie, and the config beside it.

    Raises:
        NotFound: There is no config, or several saves and none of them is named.
        FormatError: A file is malformed.
        Unsupported: A config of another kind of adapter than LoRA.
        PlanError: Keys or shapes that contradict each other or the config; all of them.
    """
    files = torchtune_files(path.absolute())
    if len(files) > 1:
        raise NotFound(
            f"{path} has {len(files)} saves of torchtune: {', '.join(file.name for file in files)}",
            f"name the one that is meant, such as {files[-1]}",
        )
    (file,) = files
    folder = file.parent
    if not (folder / CONFIG).is_file():
        raise NotFound(
            f"{file} is an adapter of torchtune, and no {CONFIG} beside it says how to scale it",
            f"write one, with the numbers of the training: {_EXAMPLE}",
        )
    config, source = read_json_source(folder / CONFIG)
    check(config, given, folder / CONFIG)
    if config["peft_type"] != "LORA":
        kind = clean(config["peft_type"])
        raise FormatError(f"{folder / CONFIG} says peft_type {kind}, and torchtune trains LORA")
    header = read_header(file)
    tensors = {ref.name: ref for ref in header.tensors}
    if not tensors:
        raise FormatError(f"{file} holds no tensors")
    entries, problems = _entries(tensors, config)
    if problems:
        raise PlanError(f"the adapter {given}", problems)
    kept, left = beside_adapter(folder)
    base = config.get("base_model_name_or_path")
    return Adapter(
        given=given,
        folder=str(folder),
        sources=(header.source, source),
        kind="LORA",
        entries=tuple(entries),
        tensors=tensors,
        config=config,
        base_model=clean(base) if base else None,
        revision=None,
        notes=(),
        side_files=tuple(kept),
        left_out=tuple(left),
        format="torchtune",
    )


_EXAMPLE = '{"peft_type": "LORA", "r": 8, "lora_alpha": 16}'


def _entries(
    tensors: Mapping[str, TensorRef], config: dict[str, Any]
) -> tuple[list[AdapterEntry], list[Problem]]:
    modules: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    entries: list[AdapterEntry] = []
    problems: list[Problem] = []
    for key, ref in tensors.items():
        ending = next((ending for ending in _ROLES if key.endswith(f".{ending}")), None)
        if ending is None:
            problems.append(
                Problem(
                    f"tensor {key!r} in {ref.file} has no ending that weft knows",
                    f"known endings of torchtune: {', '.join(f'.{ending}' for ending in _ROLES)}",
                )
            )
        elif ref.numel == 0:
            problems.append(
                Problem(
                    f"tensor {key!r} in {ref.file} is empty, shape {list(ref.shape)}",
                    "a distributed run saved without gathering its shards: save it again",
                )
            )
        else:
            modules[key.removesuffix(f".{ending}")][_ROLES[ending]] = ref
    for name, roles in modules.items():
        entry = _entry(name, roles, config)
        (problems if isinstance(entry, Problem) else entries).append(entry)  # type: ignore[arg-type]
    return entries, problems


def _entry(
    name: str, roles: Mapping[str, TensorRef], config: dict[str, Any]
) -> AdapterEntry | Problem:
    file = next(iter(roles.values())).file
    shapes = ", ".join(
        f"{ref.name.removeprefix(name + '.')} {list(ref.shape)}" for ref in roles.values()
    )
    module = _hugging_face(name)
    if module is None:
        return Problem(
            f"module {name!r} in {file} is none that weft knows of torchtune's models",
            "those of Llama, Mistral, Gemma and Qwen2 are known; merge it with torchtune",
        )
    if missing := [ending for ending, role in _ROLES.items() if role in "AB" and role not in roles]:
        return Problem(
            f"module {name!r} in {file} has {shapes} and lacks {' and '.join(missing)}",
            "the file lost tensors: save or download the adapter again",
        )
    A, B = roles["A"], roles["B"]
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
        return Problem(
            f"module {name!r} in {file}: {shapes} are not two matrices that share a rank "
            "(rows of lora_a, columns of lora_b)",
            "the file is damaged: save or download the adapter again",
        )
    magnitude = roles.get("magnitude")
    if magnitude and magnitude.shape != B.shape[:1]:
        return Problem(f"module {name!r} in {file}: {shapes}; magnitude has not the rows of lora_b")
    if problem := rank_problem(module, file, A.shape[0], config):
        return problem
    scaling = scaling_of(module, A.shape[0], config)
    if isinstance(scaling, Problem):
        return scaling
    params: tuple[tuple[str, Param], ...] = ()
    if module.endswith(_ROTATED):
        params = (("rotary", True),)
    kind = "dora" if magnitude else "lora"
    return AdapterEntry(module, "weight", kind, tuple(roles.items()), scaling, params)


def _hugging_face(name: str) -> str | None:
    """The module that transformers has in place of torchtune's."""
    if name == "output":
        return "lm_head"
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    inside = _MODULES.get(found[2]) if found else None
    return f"model.layers.{found[1]}.{inside}" if found and inside else None
