"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

Keys are `base_model.model.` + module path + suffix. What each suffix means, and which config
fields change the merged weight, was read off files that PEFT 0.21.2 wrote.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from weft.core.errors import FormatError, NotFound, PlanError, Problem
from weft.core.specs import Adapter, AdapterEntry, Param, TensorRef
from weft.core.units import clean
from weft.formats.adapters._peft_config import CONFIG, KNOWN, check, rank_problem, scaling_of
from weft.formats.adapters._peft_methods import Module, methods
from weft.formats.adapters._peft_methods._tokens import token_rows
from weft.formats.checkpoint import read_header, read_json, same_bytes

if TYPE_CHECKING:
    from pathlib import Path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weft.formats.adapters._peft_methods import PeftMethod

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."

# suffix of a key -> role of the tensor
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "B_bias",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
}

# Where a module that is wrapped keeps the weight that it had before.
_ORIGINALS = ("token_adapter.base_layer", "base_layer", "original_module")
# The files that make a tokenizer; a vocabulary among them makes it complete.
TOKENIZER_VOCABULARIES = {
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
}
TOKENIZER_FILES = TOKENIZER_VOCABULARIES | {
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
}


def detect(path: Path) -> bool:
    return path.is_dir() and os.path.lexists(path / CONFIG)


def read(path: Path, given: str) -> Adapter:
    """Read the headers and the config of the PEFT adapter in `path`.

    Raises:
        NotFound: The config is there and the weights are not.
        FormatError: A file is malformed.
        Unsupported: A kind of adapter that weft does not merge, by name.
        PlanError: Keys or shapes that contradict each other or the config; all of them.
    """
    path = path.absolute()
    config = read_json(path / CONFIG)
    check(config, given, path / CONFIG)
    files = [path / name for name in _FILES if (path / name).is_file()]
    if not files:
        raise NotFound(
            f"{path} has {CONFIG} and no adapter_model.safetensors or .bin",
            "finish the download, or the save that was cut short",
        )
    header = read_header(files[0])  # PEFT, too, prefers safetensors where both are there
    tensors = {ref.name: ref for ref in header.tensors}
    if not tensors:
        raise FormatError(f"{files[0]} holds no tensors")
    entries, problems = _entries(tensors, config)
    if problems:
        raise PlanError(f"the adapter {given}", problems)
    method = methods().get(config["peft_type"])
    known = KNOWN | method.FIELDS if method else KNOWN
    unknown = sorted(key for key in set(config) - known if config[key])
    notes = []
    if unknown:
        names = ", ".join(map(clean, unknown))
        notes.append(f"{CONFIG} has keys that weft does not know and ignores: {names}")
    biases = any(e.parameter == "bias" and e.kind == "replace" for e in entries)
    if config.get("bias") not in (None, False, "none") and not biases:
        only = "lora_only" if not method else "this method"
        notes.append(
            f"bias={clean(repr(config['bias']))}, and no bias is in the file: PEFT 0.7 to 0.20 did "
            f"not save those of {only}"
        )
    base = config.get("base_model_name_or_path")
    revision = config.get("revision")
    return Adapter(
        given=given,
        folder=str(path),
        files=(str(files[0]), str(path / CONFIG)),
        kind=str(config["peft_type"]),
        entries=tuple(entries),
        tensors=tensors,
        config=config,
        base_model=clean(base) if base else None,
        revision=revision or None,
        notes=tuple(notes),
        side_files=tuple(sorted(f for f in TOKENIZER_FILES if (path / f).is_file())),
    )


# ------------------------------------------------------------------------------------ key grammar


def _entries(
    tensors: dict[str, TensorRef], config: dict[str, Any]
) -> tuple[list[AdapterEntry], list[Problem]]:
    problems: list[Problem] = []
    modules: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    replaced: list[tuple[str, TensorRef]] = []
    method = methods().get(config["peft_type"])
    suffixes = _longest_first(method.SUFFIXES if method else _SUFFIXES)
    own = re.compile(rf"\.(lora|trainable_tokens|{re.escape(config['peft_type'].lower())})_")
    shared_keys = _shared_keys(tensors, getattr(method, "SHARED", {}))
    shared = {role: tensors[key] for key, role in shared_keys.items()}
    for key, ref in tensors.items():
        if key in shared_keys:
            continue
        if not key.startswith(_PREFIX):
            problems.append(
                Problem(
                    f"tensor {key!r} in {ref.file} does not begin with {_PREFIX!r}",
                    "every key that PEFT writes begins so: save it with PEFT, or rename the keys",
                )
            )
            continue
        if ref.numel == 0 and not getattr(method, "MAY_BE_EMPTY", False):
            problems.append(
                Problem(
                    f"tensor {key!r} in {ref.file} is empty, shape {list(ref.shape)}",
                    "a ZeRO-3 or FSDP run saved without gathering its shards: save it again",
                )
            )
            continue
        path = key.removeprefix(_PREFIX)
        suffix = next((s for s in suffixes if path.endswith(s)), None)
        if suffix:
            module = path.removesuffix(suffix)
            if ".base_layer" in f".{module}.":
                problems.append(_nested(key, ref))
            elif suffixes[suffix] in modules[module]:
                problems.append(
                    Problem(f"tensor {key!r} in {ref.file} stands for one seen already")
                )
            else:
                modules[module][suffixes[suffix]] = ref
        elif own.search(path):
            problems.append(
                Problem(
                    f"tensor {key!r} in {ref.file} has no ending that weft knows",
                    f"known endings: {', '.join(suffixes)}",
                )
            )
        else:
            replaced.append((path, ref))
    entries: list[AdapterEntry] = []
    for module, roles in modules.items():
        if method:
            endings = {role: ending for ending, role in method.SUFFIXES.items()}
            held = Module(module, roles, shared, config, endings, len(modules))
            found, wrong = _method_entries(held, method)
        else:
            found, wrong = _module_entries(module, roles, config)
        entries += found
        problems += wrong
    used = {ref for entry in entries for _, ref in entry.tensors}
    if idle := [key for key in shared_keys if tensors[key] not in used]:
        problems = problems or [
            Problem(f"no module of the adapter has a use for {', '.join(idle)}")
        ]
    copies, wrong = _saved_twice(replaced)
    problems += wrong
    entries += [_replacement(path, ref, config) for path, ref in replaced if path not in copies]
    problems += _lost_modules(entries, config)
    problems = problems or _broken_promises(entries, config)
    return entries, problems


def _shared_keys(tensors: Mapping[str, TensorRef], shared: Mapping[str, str]) -> dict[str, str]:
    """Key -> role of the tensors that all modules use."""
    found = {key: role for key, role in shared.items() if key in tensors}
    for start in (key for key in shared if key.endswith(".")):
        named = (key for key in tensors if key.startswith(start))
        found |= {key: shared[start] + key.removeprefix(start) for key in named}
    return found


def _longest_first(suffixes: Mapping[str, str]) -> dict[str, str]:
    return dict(sorted(suffixes.items(), key=lambda item: -len(item[0])))


def _method_entries(module: Module, method: PeftMethod) -> tuple[list[AdapterEntry], list[Problem]]:
    read = method.read(module)
    if isinstance(read, Problem):
        return [], [read]
    used = {ref for entry in read for _, ref in entry.tensors}
    unused = [ref.name for ref in module.tensors.values() if ref not in used]
    if unused:
        what = f"{', '.join(unused)} in {module.file} belong to nothing that {method.PEFT_TYPE} has"
        return [], [Problem(what, "the config and the weights are not of one save")]
    return read, []


def _nested(key: str, ref: TensorRef) -> Problem:
    return Problem(
        f"tensor {key!r} in {ref.file} wraps a layer twice (fused experts or attention)",
        "this release of weft does not merge nested layers: use PEFT's merge_and_unload",
    )


def _replacement(path: str, ref: TensorRef, config: dict[str, Any]) -> AdapterEntry:
    """A full tensor: `modules_to_save`, `bias=`, an embedding saved along."""
    module, _, parameter = path.rpartition(".")
    # PEFT captures by plain endswith, without a dot boundary ("norm" takes input_layernorm, too).
    named = config.get("modules_to_save") or []
    saved = next((p for p in _parents(module) if any(p.endswith(name) for name in named)), None)
    wrapper = next((w for w in _ORIGINALS if f".{module}".endswith("." + w)), "")
    module = module.removesuffix(wrapper or "modules_to_save").removesuffix(".")
    params: tuple[tuple[str, Param], ...] = ()
    if wrapper and parameter == "weight":
        params = (("own_base", True),)
    return AdapterEntry(
        module, parameter, "replace", (("value", ref),), params=params, saved_as=saved
    )


def _broken_promises(entries: Sequence[AdapterEntry], config: dict[str, Any]) -> list[Problem]:
    """What the config says was trained, and no tensor of the file shows."""
    kinds = {entry.kind for entry in entries}
    missing = []
    if config.get("trainable_token_indices") and "trainable_tokens" not in kinds:
        missing.append("trainable_token_indices names tokens, and no trained rows")
    if config.get("lora_bias") and "lora_bias" not in kinds:
        missing.append("lora_bias is true, and no lora_B.bias")
    heads = {"classifier", "score", "qa_outputs"}  # PEFT lists them all, whichever the model has
    missing += [
        f"modules_to_save names {name!r}, and none of its tensors"
        for name in sorted(set(config.get("modules_to_save") or []) - heads)
        if not any(e.saved_as and e.saved_as.endswith(name) for e in entries)
    ]
    return [
        Problem(
            f"{CONFIG}: {fact} are in the file",
            "the save lost what was trained: save the adapter again",
        )
        for fact in missing
    ]


def _saved_twice(replaced: Sequence[tuple[str, TensorRef]]) -> tuple[set[str], list[Problem]]:
    """With a resized vocabulary PEFT writes a module of `modules_to_save` under two keys."""
    found = dict(replaced)
    copies: set[str] = set()
    problems = []
    for path, ref in replaced:
        plain = path.replace(".modules_to_save.", ".")
        if plain != path and plain in found:
            copies.add(path)
            if not same_bytes(ref, found[plain]):
                problems.append(
                    Problem(f"{ref.name!r} and {found[plain].name!r} in {ref.file} differ")
                )
    return copies, problems


def _lost_modules(entries: Sequence[AdapterEntry], config: dict[str, Any]) -> list[Problem]:
    """Modules that were trained in full, and of which only the untrained original was saved."""
    saved = {entry.target for entry in entries if not entry.params and entry.kind == "replace"}
    return [
        Problem(
            f"modules_to_save names {entry.module!r}, and {entry.tensors[0][1].file} has only "
            f"{entry.tensors[0][1].name!r}, what it was before training",
            "this release of PEFT lost what was trained; nothing can bring it back from this file",
        )
        for entry in entries
        if dict(entry.params).get("own_base")
        and any(entry.module.endswith(name) for name in config.get("modules_to_save") or [])
        and entry.target not in saved
    ]


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _module_entries(
    module: str, roles: dict[str, TensorRef], config: dict[str, Any]
) -> tuple[list[AdapterEntry], list[Problem]]:
    entries: list[AdapterEntry] = []
    problems: list[Problem] = []
    if rows := roles.pop("rows", None):
        entry = token_rows(module, rows, config, "trainable_token_indices")
        (problems if isinstance(entry, Problem) else entries).append(entry)  # type: ignore[arg-type]
    if not roles:
        return entries, problems
    file = next(iter(roles.values())).file
    embedding = "embedding_A" in roles or "embedding_B" in roles
    a, b = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    missing = [role for role in (a, b) if role not in roles]
    if missing:
        names = " and ".join(f"lora_{role}" for role in missing)
        there = ", ".join(ref.name for ref in roles.values())
        problems.append(
            Problem(
                f"module {module!r} in {file} has {there} and lacks {names}",
                "the file lost tensors: save or download the adapter again",
            )
        )
        return entries, problems
    if embedding and {"A", "B", "B_bias"} & set(roles):
        problems.append(Problem(f"module {module!r} in {file} has both kinds of factors"))
        return entries, problems
    A, B = roles[a], roles[b]
    wrong = _factor_shapes(module, A, B) or rank_problem(module, A, config)
    scaling = scaling_of(module, A.shape[0], config) if not wrong else Problem("")
    if wrong or isinstance(scaling, Problem):
        problems.append(wrong or scaling)  # type: ignore[arg-type]
        return entries, problems
    tensors = [("A", A), ("B", B)]
    params: tuple[tuple[str, Param], ...] = (("transposed", True),) if embedding else ()
    kind = "lora"
    magnitude = roles.get("magnitude")
    if bool(config.get("use_dora")) != (magnitude is not None):
        problems.append(
            Problem(
                f"module {module!r} in {file} has {'a' if magnitude else 'no'} "
                f"lora_magnitude_vector, and use_dora is {bool(config.get('use_dora'))}",
                "the config and the weights are not of one save",
            )
        )
    elif magnitude:
        kind = "dora"
        tensors.append(("magnitude", magnitude))
    entries.append(AdapterEntry(module, "weight", kind, tuple(tensors), scaling, params))
    if bias := roles.get("B_bias"):
        entries.append(AdapterEntry(module, "bias", "lora_bias", (("bias", bias),), scaling))
    return entries, problems


def _factor_shapes(module: str, A: TensorRef, B: TensorRef) -> Problem | None:
    shapes = f"lora_A {list(A.shape)}, lora_B {list(B.shape)}"
    if len(A.shape) > 2 and len(A.shape) == len(B.shape):
        return Problem(
            f"module {module!r} in {A.file} is LoRA on a convolution ({shapes})",
            "this release of weft does not merge convolutions: use PEFT's merge_and_unload",
        )
    if len(A.shape) != 2 or len(B.shape) != 2:
        return Problem(
            f"module {module!r} in {A.file}: {shapes} are not two matrices",
            "flat factors are what FSDP leaves when it saves without gathering: save it again",
        )
    if A.shape[0] != B.shape[1]:
        return Problem(
            f"module {module!r} in {A.file}: {shapes} do not share a rank "
            f"({A.shape[0]} rows of A, {B.shape[1]} columns of B)"
        )
    return None
