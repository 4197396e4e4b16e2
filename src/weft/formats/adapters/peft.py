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
from weft.formats.adapters import _peft_lora as lora
from weft.formats.adapters._config import strays, torchtune_files, written_by_mlx
from weft.formats.adapters._elsewhere import shards_beside
from weft.formats.adapters._peft_config import (
    CONFIG,
    KNOWN,
    check,
    matching,
    moved_base,
    selection_of,
    trains_in_place,
)
from weft.formats.adapters._peft_methods import Module, methods
from weft.formats.adapters._repairs import PREFIX, repair
from weft.formats.checkpoint import read_header, read_json_source, same_bytes
from weft.formats.side_files import beside_adapter

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from weft.formats.adapters._peft_methods import PeftMethod

_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Where a module that is wrapped keeps the weight that it had before.
_ORIGINALS = ("token_adapter.base_layer", "base_layer", "original_module")


def detect(path: Path) -> bool:
    if torchtune_files(path):
        return False
    folder = _folder(path)
    return os.path.lexists(folder / CONFIG) and not written_by_mlx(folder)


def _folder(path: Path) -> Path:
    """The adapter's folder; one of its own files stands for it."""
    return path.parent if path.name in (CONFIG, *_FILES) and path.is_file() else path


def read(path: Path, given: str) -> Adapter:
    """Read the headers and the config of the PEFT adapter in `path`.

    Raises:
        NotFound: The config is there and the weights are not.
        FormatError: A file is malformed.
        Unsupported: A kind of adapter that weft does not merge, by name.
        PlanError: Keys or shapes that contradict each other or the config; all of them.
    """
    asked = path.name
    path = _folder(path.absolute())
    config, source = read_json_source(path / CONFIG)
    check(config, given, path / CONFIG)
    # PEFT, too, prefers safetensors where both are there; unless the other one was named.
    files = [path / name for name in _FILES if (path / name).is_file()]
    files.sort(key=lambda file: file.name != asked)
    if not files:
        raise NotFound(
            f"{path} has {CONFIG} and no adapter_model.safetensors or .bin",
            shards_beside(path) or "finish the download, or the save that was cut short",
        )
    header = read_header(files[0])
    tensors = {ref.name: ref for ref in header.tensors}
    if not tensors:
        raise FormatError(f"{files[0]} holds no tensors", shards_beside(path))
    method = methods().get(config["peft_type"])
    repaired = repair(
        tensors, method.SUFFIXES if method else lora.SUFFIXES, nested=_wraps_twice(tensors, config)
    )
    named = {new: tensors[old] for new, old in repaired.keys.items()}
    entries, problems = _entries(named, config, path)
    problems = [*repaired.problems, *problems, *_lost_patterns(repaired.keys, entries, config)]
    if problems:
        raise PlanError(f"the adapter {given}", problems)
    known = KNOWN | method.FIELDS if method else KNOWN
    unknown = sorted(key for key in set(config) - known if config[key])
    notes = []
    if unknown:
        names = ", ".join(map(clean, unknown))
        notes.append(f"{CONFIG} has keys that weft does not know and ignores: {names}")
    notes += lora.notes(entries, named, config)
    notes += getattr(method, "notes", lambda config: [])(config)
    notes += [*_idle_patterns(entries, config), *strays(path)]
    kept, left = beside_adapter(path)
    base = config.get("base_model_name_or_path")
    revision = config.get("revision")
    return Adapter(
        given=given,
        folder=str(path),
        sources=(header.source, source),
        kind=str(config["peft_type"]),
        entries=tuple(entries),
        tensors=tensors,
        config=config,
        base_model=clean(base) if base else None,
        revision=revision or None,
        notes=tuple(notes),
        side_files=tuple(kept),
        left_out=tuple(left),
        selection=selection_of(config),
        repairs=repaired.repairs,
        keys=repaired.keys,
        moved_base=None if method else moved_base(config),
    )


def _idle_patterns(entries: Sequence[AdapterEntry], config: dict[str, Any]) -> list[str]:
    """What a pattern says of no module at all: a typing error, or a name from another model."""
    modules = {entry.module for entry in entries}
    modules |= {entry.target for entry in entries}
    idle = [
        f"{field} has {clean(repr(pattern))}"
        for field in ("alpha_pattern", "rank_pattern")
        for pattern in config.get(field) or {}
        if not any(matching({pattern: 0}, module) for module in modules)
    ]
    return [f"{CONFIG}: {', '.join(idle)}, which no module of the file matches"] if idle else []


def _lost_patterns(
    keys: Mapping[str, str], entries: Sequence[AdapterEntry], config: dict[str, Any]
) -> list[Problem]:
    """Patterns that matched a module under the name that it had, and do not under the repaired."""
    named = {ref.name: entry.module for entry in entries for _, ref in entry.tensors}
    problems = {}
    for new, old in keys.items():
        module = named.get(old)
        if new == old or module is None or not new.startswith(f"{PREFIX}{module}."):
            continue
        stem = new.removeprefix(f"{PREFIX}{module}.").partition(".")[0]
        before = re.split(rf"\.({stem}|lora_down|lora_up)(\.|$)", old)[0].removeprefix(PREFIX)
        for field in ("alpha_pattern", "rank_pattern"):
            patterns = config.get(field)
            if isinstance(patterns, dict) and matching(patterns, module) != matching(
                patterns, before
            ):
                problems[field, module] = Problem(
                    f"{CONFIG}: {field} speaks of {before!r}, and with its key repaired the module "
                    f"is {module!r}, which it does not match",
                    f"write {field} for the repaired name",
                )
    return list(problems.values())


# ------------------------------------------------------------------------------------ key grammar


def _wraps_twice(keys: Collection[str], config: dict[str, Any]) -> bool:
    """Whether `base_layer` before a factor is PEFT's: fused experts, and attention as a whole."""
    return bool(config.get("target_parameters")) or any(
        ".base_layer.out_proj." in key or key.replace(".base_layer.", ".") in keys
        for key in keys
        if ".base_layer." in key
    )


def _entries(
    tensors: dict[str, TensorRef], config: dict[str, Any], folder: Path
) -> tuple[list[AdapterEntry], list[Problem]]:
    problems: list[Problem] = []
    modules: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    replaced: list[tuple[str, TensorRef]] = []
    method = methods().get(config["peft_type"])
    suffixes = _longest_first(method.SUFFIXES if method else lora.SUFFIXES)
    own = re.compile(rf"\.(lora|trainable_tokens|{re.escape(config['peft_type'].lower())})_")
    shared_keys = _shared_keys(tensors, getattr(method, "SHARED", {}))
    shared = {role: tensors[key] for key, role in shared_keys.items()}
    ungathered = "a ZeRO-3 or FSDP run saved without gathering its shards: save it again"
    if any(ref.numel == 0 for ref in tensors.values()):
        ungathered = shards_beside(folder) or ungathered
    for key, ref in tensors.items():
        if key in shared_keys:
            continue
        if not key.startswith(PREFIX):
            problems.append(
                Problem(
                    f"tensor {key!r} in {ref.file} does not begin with {PREFIX!r}",
                    "every key that PEFT writes begins so: save it with PEFT, or rename the keys",
                )
            )
            continue
        if ref.numel == 0 and not getattr(method, "MAY_BE_EMPTY", False):
            problems.append(
                Problem(
                    f"tensor {key!r} in {ref.file} is empty, shape {list(ref.shape)}",
                    ungathered,
                )
            )
            continue
        path = key.removeprefix(PREFIX)
        if not method and lora.only_for_training(path, config):
            continue
        suffix = next((s for s in suffixes if path.endswith(s)), None)
        if suffix:
            module = path.removesuffix(suffix)
            if method and ".base_layer" in f".{module}.":
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
    if method:
        endings = {role: ending for ending, role in method.SUFFIXES.items()}
        read_all = [
            _method_entries(Module(m, r, shared, config, endings, len(modules)), method)
            for m, r in modules.items()
        ]
    else:
        read_all = [lora.read(modules, config)]
    entries = [entry for found, _ in read_all for entry in found]
    problems += [problem for _, wrong in read_all for problem in wrong]
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
        f"tensor {key!r} in {ref.file} wraps a layer twice",
        "only LoRA's layers are nested, in experts and in attention",
    )


def _replacement(path: str, ref: TensorRef, config: dict[str, Any]) -> AdapterEntry:
    """A full tensor: `modules_to_save`, `bias=`, an embedding saved along."""
    module, _, parameter = path.rpartition(".")
    # PEFT captures by plain endswith, without a dot boundary ("norm" takes input_layernorm, too).
    named = config.get("modules_to_save") or []
    saved = next((p for p in _parents(module) if any(p.endswith(name) for name in named)), None)
    wrapper = next((w for w in _ORIGINALS if f".{module}".endswith("." + w)), "")
    module = module.removesuffix(wrapper or "modules_to_save").removesuffix(".")
    module = module.replace(".base_layer.", ".")  # of attention whose out_proj is wrapped, too
    while module.endswith(".base_layer"):  # of experts with several adapted parameters
        module = module.removesuffix(".base_layer")
    params: tuple[tuple[str, Param], ...] = ()
    if wrapper and parameter == "weight":
        params = (("own_base", True),)
    elif saved and trains_in_place(config):
        params = (("both_ends", True),)  # of a tied embedding: it was one weight all along
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
    saved = {
        entry.target
        for entry in entries
        if entry.kind == "replace" and not dict(entry.params).get("own_base")
    }
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
