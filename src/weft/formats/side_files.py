"""The files beside the weights: which of them belong to a model, and what an adapter brings."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from weft.core.errors import FormatError

if TYPE_CHECKING:
    from pathlib import Path

# What a tokenizer and a processor consist of, by the names that transformers gives the files.
TOKENIZER, TEMPLATE, PROCESSOR = "tokenizer", "chat template", "processor"
_VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json"),
    *("*.model", "*.spm", "*.tiktoken"),
)
_PARTS = {
    TEMPLATE: ("*.jinja", "chat_template.json"),
    PROCESSOR: (
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
        "audio_tokenizer_config.json",
    ),
    TOKENIZER: (
        *_VOCABULARIES,
        *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
        *("*.bpe", "*.vocab", "normalizer.json"),
    ),
}
KEPT_FOLDERS = {"additional_chat_templates", "chat_templates"}

KEPT_SUFFIXES = {
    *(".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".bpe", ".spm", ".vocab", ".md"),
}
KEPT_NAMES = {"LICENSE", "NOTICE"}
# Written anew, and about the training and not about the model.
_NOT_KEPT = {"README.md", "weft.json"}
_OF_TRAINING = {"adapter_config.json", "trainer_state.json", "all_results.json"}
# What trainers leave in an adapter's folder, and nobody misses in a model.
_LEFTOVERS = (
    *(
        "adapter_*",
        "README.md",
        "weft.json",
        "training_args.*",
        "trainer_state.json",
        "trainer_log.jsonl",
    ),
    *("adapters.safetensors", "*_adapters.safetensors"),
    *("optimizer*", "scheduler*", "scaler.pt", "rng_state*", "random_states*", "*_results.json"),
    *("global_step*", "latest", "zero_to_fp32.py", "checkpoint-*", "runs", "wandb", "logs"),
    *("events.out.*", "training_*.png", "llamaboard_config.yaml", "running_log.txt"),
    *("args.json", "sft_args.json", "additional_config.json", "configuration.json"),  # ms-swift
)


def part_of(name: str) -> str | None:
    """What the file `name` is a part of: TOKENIZER, TEMPLATE or PROCESSOR, if of any."""
    folder, _, inside = name.partition("/")
    if inside:  # sentence-transformers has whole models in folders, with files of their own
        return TEMPLATE if folder in KEPT_FOLDERS else None
    return next((part for part, patterns in _PARTS.items() if _fits(name, patterns)), None)


def is_vocabulary(name: str) -> bool:
    """Whether the file makes a tokenizer complete; the others of its part only describe it."""
    return part_of(name) == TOKENIZER and _fits(name, _VOCABULARIES)


def beside_model(folder: Path, weights: list[str]) -> tuple[list[str], list[str]]:
    """What belongs to the model beside its weights, and what else lies in the folder."""
    kept: list[str] = []
    left: list[str] = []
    folders = set(KEPT_FOLDERS)
    if (folder / "modules.json").is_file():  # sentence-transformers: one folder per module
        folders |= _module_folders(folder / "modules.json")
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in weights or path.name.endswith(".index.json"):
            continue
        if path.is_dir():
            if path.name in folders:
                kept += _files_in(path)
            else:
                left.append(path.name + "/")
        elif path.name in _NOT_KEPT:
            continue
        elif path.name in _OF_TRAINING:
            left.append(path.name)
        elif path.suffix in KEPT_SUFFIXES or path.name in KEPT_NAMES:
            if not path.is_file():
                raise FormatError(f"{path} is a link to nothing", "finish the download")
            kept.append(path.name)
        else:
            left.append(path.name)
    return kept, left


def beside_adapter(folder: Path) -> tuple[list[str], list[str]]:
    """What of a tokenizer or processor lies beside an adapter, and what else that is no leftover.

    Code (`tokenization_….py`) is of the second kind: a model takes none but its base's own.
    """
    kept: list[str] = []
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or _fits(path.name, _LEFTOVERS):
            continue
        if path.is_dir() and path.name in KEPT_FOLDERS:
            kept += _files_in(path)
        elif path.is_file() and part_of(path.name):
            kept.append(path.name)
        else:
            left.append(path.name + "/" * path.is_dir())
    return kept, left


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _files_in(folder: Path) -> list[str]:
    return [str(f.relative_to(folder.parent)) for f in sorted(folder.rglob("*")) if f.is_file()]


def _module_folders(path: Path) -> set[str]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return {m["path"] for m in modules if m["path"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FormatError(f"{path} is not a list of modules with their paths") from None
