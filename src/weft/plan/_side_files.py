"""The files beside the weights: config, tokenizer, chat template, and what else the base has."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core.specs import Adapter, Checkpoint, SideFile
from weft.formats.adapters.peft import TOKENIZER_FILES, TOKENIZER_VOCABULARIES
from weft.formats.checkpoint import read_json
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Sequence

_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def side_files(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    dtype: str | None,
    cast: bool,
    rows: int | None,
    untied: bool,
) -> tuple[list[SideFile], list[str]]:
    """Every file beside the shards, and notes on where they come from.

    Args:
        base: The base model.
        adapters: Each with its weight.
        dtype: What most of the output is written in.
        cast: All of it was asked for in that dtype.
        rows: The new size of the vocabulary, if it changed.
        untied: The output has an output embedding of its own, which the base had not.
    """
    files = {name: SideFile(name, source=f"{base.folder}/{name}") for name in base.side_files}
    notes: list[str] = []
    if "config.json" in files:
        config = patched(base.config, dtype=dtype, cast=cast, rows=rows, untied=untied)
        if config != base.config:
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            files["config.json"] = SideFile("config.json", text=text)
    else:
        notes.append(f"{base.given} has no config.json, and so the output has none")
    notes += _tokenizer(files, base, [adapter for adapter, weight in adapters if weight])
    if rows is not None and not any(
        f.source and base.folder not in f.source for f in files.values()
    ):
        notes.append(f"the vocabulary has {rows} rows now, and the tokenizer is still the base's")
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


def _tokenizer(
    files: dict[str, SideFile], base: Checkpoint, adapters: Sequence[Adapter]
) -> list[str]:
    """Put the adapter's own tokenizer, or its chat template alone, in place of the base's."""
    whole = [a for a in adapters if TOKENIZER_VOCABULARIES & set(a.side_files)]
    templates = [a for a in adapters if _brings_template(a)]
    notes = []
    for name, found in (("tokenizer", whole), ("chat template", templates)):
        if len({_content(adapter, name) for adapter in found}) > 1:
            others = ", ".join(adapter.given for adapter in found[1:])
            notes.append(f"{name}s differ: {found[0].given}'s is used, and not that of {others}")
    if whole:
        adapter = whole[0]
        kept = {} if _brings_template(adapter) else {n: files[n] for n in _TEMPLATES if n in files}
        for name in TOKENIZER_FILES & set(files):
            del files[name]
        files |= {n: SideFile(n, source=f"{adapter.folder}/{n}") for n in adapter.side_files} | kept
        template = "and chat template " if not kept and _brings_template(adapter) else ""
        notes.append(f"tokenizer {template}from {adapter.given}")
    elif templates:
        adapter = templates[0]
        for name in _TEMPLATES:
            files.pop(name, None)
            if name in adapter.side_files:
                files[name] = SideFile(name, source=f"{adapter.folder}/{name}")
        notes.append(f"tokenizer from {base.given}, chat template from {adapter.given}")
    elif TOKENIZER_FILES & set(files):
        notes.append(f"tokenizer and chat template from {base.given}")
    return notes


def _brings_template(adapter: Adapter) -> bool:
    if any(name in adapter.side_files for name in _TEMPLATES):
        return True
    complete = TOKENIZER_VOCABULARIES & set(adapter.side_files)
    config = Path(adapter.folder, "tokenizer_config.json")
    return bool(complete) and config.is_file() and "chat_template" in read_json(config)


def _content(adapter: Adapter, name: str) -> tuple[bytes, ...]:
    files = _TEMPLATES if name == "chat template" else sorted(TOKENIZER_FILES)
    return tuple(Path(adapter.folder, f).read_bytes() for f in files if f in adapter.side_files)
