"""The files beside the weights: config, tokenizer, chat template, and what else the base has."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core.specs import Adapter, Checkpoint, SideFile
from weft.formats.checkpoint import read_json
from weft.formats.side_files import PROCESSOR, TEMPLATE, TOKENIZER, is_vocabulary, part_of
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Sequence


def side_files(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    dtype: str | None,
    cast: bool,
    rows: int | None,
    untied: bool,
    stored: dict[str, Any],
) -> tuple[list[SideFile], list[str]]:
    """Every file beside the shards, and notes on where they come from.

    Args:
        base: The base model.
        adapters: Each with its weight.
        dtype: What most of the output is written in.
        cast: All of it was asked for in that dtype.
        rows: The new size of the vocabulary, if it changed.
        untied: The output has an output embedding of its own, which the base had not.
        stored: The config as it lies beside the base.
    """
    files = {name: SideFile(name, source=f"{base.folder}/{name}") for name in base.side_files}
    notes: list[str] = []
    if "config.json" in files:
        config = patched(base.config, dtype=dtype, cast=cast, rows=rows, untied=untied)
        if config != stored:
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            files["config.json"] = SideFile("config.json", text=text)
    used = [adapter for adapter, weight in adapters if weight]
    owners, differing = _take(files, used)
    notes += _origins(files, owners, base) + differing
    if rows is not None and TOKENIZER not in owners:
        notes.append(f"the vocabulary has {rows} rows now, and the tokenizer is still the base's")
    for adapter in used:
        notes += _not_copied(adapter, owners)
    if base.left_out:
        notes.append(f"left out of the output: {', '.join(base.left_out)}")
    return [files[name] for name in sorted(files)], notes


def patched(
    config: dict[str, Any], *, dtype: str | None, cast: bool, rows: int | None, untied: bool
) -> dict[str, Any]:
    """The base's config, true to what is written."""
    config = copy.deepcopy(config)
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    keys = ("dtype", "torch_dtype")
    if dtype is not None:
        if not any(key in config for key in keys):
            config["torch_dtype"] = dtype  # read by every release of transformers
        # A part of a multimodal model may have a dtype of its own.
        for part in parts if cast else parts[:1]:
            for key in keys:
                if isinstance(part.get(key), str):
                    part[key] = dtype
    before = config_value(config, "vocab_size")
    for part in parts:
        if rows is not None and part.get("vocab_size") == before:
            part["vocab_size"] = rows
        if untied and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    if untied:
        config["tie_word_embeddings"] = False
    return config


def _take(
    files: dict[str, SideFile], adapters: Sequence[Adapter]
) -> tuple[dict[str, Adapter], list[str]]:
    """Put what the adapters bring in place of the base's files.

    Returns:
        Part -> the adapter that it is from, and a note on each of which several brought their own.
    """
    owners: dict[str, Adapter] = {}
    notes = []
    for part in (TOKENIZER, TEMPLATE, PROCESSOR):
        found = [a for a in adapters if _brings(a, part, own=a is owners.get(TOKENIZER))]
        if not found:
            continue
        first, *others = found
        if any(_content(other, part) != _content(first, part) for other in others):
            names = ", ".join(other.given for other in others)
            notes.append(f"{part}s differ: {first.given}'s is used, and not that of {names}")
        _replace(files, first, part)
        owners[part] = first
    return owners, notes


def _brings(adapter: Adapter, part: str, *, own: bool) -> bool:
    """Whether the adapter has all of a part; `own`: its tokenizer is the one that is used."""
    if part == TOKENIZER:  # whose config alone is none
        return any(map(is_vocabulary, adapter.side_files))
    config = Path(adapter.folder, "tokenizer_config.json")
    inside = part == TEMPLATE and own and config.is_file() and "chat_template" in read_json(config)
    return inside or bool(_files_of(adapter, part))


def _replace(files: dict[str, SideFile], adapter: Adapter, part: str) -> None:
    """The adapter's own files of a part, and none of the base's that would contradict them."""
    if part != PROCESSOR:  # whose files stand side by side, one for images and one for sound
        for name in [name for name in files if part_of(name) == part]:
            del files[name]
    for name in _files_of(adapter, part):
        files[name] = SideFile(name, source=f"{adapter.folder}/{name}")


def _files_of(adapter: Adapter, part: str) -> list[str]:
    return [name for name in adapter.side_files if part_of(name) == part]


def _content(adapter: Adapter, part: str) -> list[tuple[str, bytes]]:
    return [(n, Path(adapter.folder, n).read_bytes()) for n in _files_of(adapter, part)]


def _origins(files: dict[str, SideFile], owners: dict[str, Adapter], base: Checkpoint) -> list[str]:
    """`tokenizer and chat template from base, processor from adapter`, if there is any of it."""
    parts = {part_of(name) for name in files}
    if TOKENIZER in parts - owners.keys():
        parts.add(TEMPLATE)  # inside the tokenizer's config, if nowhere else
    said: dict[str, list[str]] = {}
    for part in (TOKENIZER, TEMPLATE, PROCESSOR):
        if part in owners:
            said.setdefault(owners[part].given, []).append(part)
        elif part in parts and part != PROCESSOR:
            said.setdefault(base.given, []).append(part)
    line = ", ".join(f"{' and '.join(found)} from {given}" for given, found in said.items())
    return [line] if line else []


def _not_copied(adapter: Adapter, owners: dict[str, Adapter]) -> list[str]:
    """What lies in the adapter's folder and does not come along."""
    parts = [name for name in adapter.side_files if part_of(name) not in owners]
    left = sorted([*parts, *adapter.left_out])
    return [f"not copied from {adapter.given}: {', '.join(left)}"] if left else []
