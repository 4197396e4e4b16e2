"""The output's tokenizer files: those of a folder, changed where its tokens have changed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from weft.core.specs import SideFile
from weft.formats.checkpoint import read_json
from weft.formats.side_files import is_vocabulary
from weft.formats.tokenizer import (
    ADDED,
    CONFIG,
    FAST,
    SPECIAL,
    TokenizerFiles,
    dumped,
    entry_of,
    member,
    read_text,
    tokenizer_names,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_DECODER = "added_tokens_decoder"


def tokenizer_files(tokenizer: TokenizerFiles) -> tuple[list[SideFile], list[str]]:
    """Every file of the output's tokenizer and chat template, and notes on what was left out.

    tokenizer.json says all there is to say; the configs beside it are kept true, since
    transformers believes their list of added tokens more than that of tokenizer.json. Without a
    tokenizer.json the added tokens stand in tokenizer_config.json alone.
    """
    folder = tokenizer.folder
    names = tokenizer_names(folder)
    files = {name: SideFile(name, source=f"{folder}/{name}") for name in names}
    if not tokenizer.changed:
        return list(files.values()), []
    config = read_json(folder / CONFIG) if CONFIG in files else {}
    old_config = dict(config)
    special = read_json(folder / SPECIAL) if SPECIAL in files else {}
    if tokenizer.vocabulary == FAST:
        files[FAST] = SideFile(FAST, text=_fast(tokenizer))
    elif _DECODER not in config:  # which, once it is there, is read in place of the older files
        config |= special
    if _DECODER in config or tokenizer.vocabulary != FAST:
        config[_DECODER] = {str(n): entry_of(token) for n, token in _by_number(tokenizer)}
    config = _without(config, tokenizer.stripped - tokenizer.numbers.keys())
    if config != old_config:
        files[CONFIG] = SideFile(CONFIG, text=dumped(config))
    kept = _without(special, tokenizer.stripped - tokenizer.numbers.keys())
    if kept != special:
        files[SPECIAL] = SideFile(SPECIAL, text=dumped(kept))
    left = [ADDED] if ADDED in files else []
    if tokenizer.stripped and tokenizer.vocabulary == FAST:  # which others would bring back
        left += [name for name in files if name != FAST and _has_pieces(name)]
    for name in left:
        del files[name]
    said = [f"tokenizer files left out, since they say otherwise: {', '.join(left)}"]
    return list(files.values()), said if left else []


def _has_pieces(name: str) -> bool:
    return is_vocabulary(name) or name == "merges.txt"


def _by_number(tokenizer: TokenizerFiles) -> list[tuple[int, Any]]:
    numbers = tokenizer.numbers
    return sorted(((numbers[t.content], t) for t in tokenizer.added.values()), key=lambda e: e[0])


def _fast(tokenizer: TokenizerFiles) -> str:
    """tokenizer.json with other added tokens; the rest stays as it stands, unless pieces went."""
    path = tokenizer.folder / FAST
    text = read_text(path)
    entries = [entry_of(token, number) for number, token in _by_number(tokenizer)]
    pieces, _, _ = member(text, "vocab", path)
    if len(pieces) == len(tokenizer.pieces):
        _, start, stop = member(text, "added_tokens", path)
        if start >= 0:
            return text[:start] + json.dumps(entries, ensure_ascii=False) + text[stop:] + "\n"
    content = read_json(path)
    model = content["model"]
    if isinstance(pieces, list):
        model["vocab"] = pieces[: len(tokenizer.pieces)]
    else:
        model["vocab"] = dict(tokenizer.pieces)
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [m for m in model["merges"] if _usable(m, prefix, tokenizer.pieces)]
    return dumped(content | {"added_tokens": entries}, compact=True)


def _usable(merge: str | list[str], prefix: int, pieces: Mapping[str, int]) -> bool:
    """Whether both parts and what they make are pieces, without which a file does not load."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in pieces and right in pieces and left + right[prefix:] in pieces


def _without(config: Mapping[str, Any], tokens: frozenset[str]) -> dict[str, Any]:
    """A config that names none of `tokens`, which loading it would bring back."""

    def names(value: Any) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        return isinstance(content, str) and content in tokens

    kept: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list) and key.endswith("_tokens"):
            kept[key] = [entry for entry in value if not names(entry)]
        elif isinstance(value, dict) and key.endswith("_tokens"):
            kept[key] = {name: entry for name, entry in value.items() if not names(entry)}
        elif not (key.endswith("_token") and names(value)):
            kept[key] = value
    return kept
