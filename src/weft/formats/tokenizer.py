"""Tokenizer files -> which token has which number, and the same files with other tokens.

A tokenizer is a *model* (BPE, WordPiece, Unigram or a list of words) with **pieces**, and **added
tokens** that are looked for in the text before the model sees it. The pieces' numbers stand in the
files; those of added tokens that are no pieces do not count as they stand there: the tokenizers
library hands them out anew as it loads the file, and so does `TokenizerFiles.extended`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from weft.core.errors import FormatError, NotFound, Unsupported
from weft.formats._sentencepiece import read_pieces
from weft.formats.checkpoint import read_json
from weft.formats.side_files import TEMPLATE, TOKENIZER, beside_adapter, part_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

FAST, CONFIG, SPECIAL, ADDED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
# In the order in which transformers looks for them.
_VOCABULARIES = (FAST, "tokenizer.model", "vocab.json", "vocab.txt")
# Whose sentencepiece numbers are the tokens' numbers; others shift or rename some.
_PLAIN_SENTENCEPIECE = {"Llama", "CodeLlama", "Gemma"}
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_AGAIN = "save or download it again"
_EXTRA = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is looked for in the text itself; the fields are those of tokenizer.json."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


_FIELDS = tuple(each.name for each in fields(AddedToken))


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer as its files say.

    Attributes:
        folder: Where they lie.
        vocabulary: The file with the pieces.
        pieces: Of the model, with their numbers.
        added: By content, in the order in which they were added.
        numbers: Of all tokens.
        specials: What the configs name as special tokens.
        stripped: Tokens of the files that are no longer wanted.
        changed: The files do not say all this yet.
        notes: What is odd about them.
    """

    folder: Path
    vocabulary: str
    pieces: Mapping[str, int] = field(repr=False)
    added: Mapping[str, AddedToken] = field(repr=False)
    numbers: Mapping[str, int] = field(repr=False)
    specials: tuple[AddedToken, ...] = ()
    stripped: frozenset[str] = frozenset()
    changed: bool = False
    notes: tuple[str, ...] = ()

    def extended(self, tokens: Iterable[AddedToken]) -> TokenizerFiles:
        """With `tokens` added, each at the next number unless it has one.

        The next number is one more than the last added token's, or the count of the pieces if that
        is more; where pieces have numbers beyond their count, it may be taken.

        Raises:
            FormatError: It is.
        """
        new = [t for t in tokens if t.content and self.added.get(t.content) != t]
        if not new:
            return self
        added, numbers = dict(self.added), dict(self.numbers)
        top = max((numbers[content] for content in added), default=-1)
        highest = max(numbers.values(), default=-1)
        for token in new:
            if token.content not in numbers:
                top = max(top + 1, len(self.pieces))
                if top <= highest and top in self.numbers.values():
                    other = next(t for t, number in self.numbers.items() if number == top)
                    raise FormatError(
                        f"{self.folder / self.vocabulary}: the next token, {token.content!r}, would"
                        f" get the number {top}, which is that of {other!r}",
                        "the numbers there have gaps: number the tokens without",
                    )
                numbers[token.content] = top
            top = max(top, numbers[token.content])
            added[token.content] = token
        return replace(self, added=added, numbers=numbers, changed=True)

    def without(self, rows: int) -> TokenizerFiles:
        """Without the tokens that are numbered `rows` or more.

        Raises:
            Unsupported: They are pieces of a file that only its own library can write.
        """
        gone = {content for content, number in self.numbers.items() if number >= rows}
        if not gone:
            return self
        pieces = {piece: n for piece, n in self.pieces.items() if n < rows}
        if len(pieces) < len(self.pieces) and self.vocabulary != FAST:
            piece = next(iter(gone & self.pieces.keys()))
            raise Unsupported(
                f"{self.folder / self.vocabulary} numbers {piece!r} {self.pieces[piece]}, and the"
                f" embedding has {rows} rows",
                _save_as_json(self.folder),
            )
        left = replace(self, pieces=pieces, added={}, numbers=pieces)
        left = left.extended(token for token in self.added.values() if token.content not in gone)
        return replace(left, stripped=self.stripped | gone, changed=True)


def fingerprint(folder: Path) -> str:
    """SHA-256 over what `read` reads: equal files need to be read only once."""
    digest = hashlib.sha256()
    for name in (*_VOCABULARIES, CONFIG, SPECIAL, ADDED):
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(b"%d:" % len(content) + content)
    return digest.hexdigest()


def tokenizer_names(folder: Path) -> list[str]:
    """The files of a tokenizer and its chat template in a folder, relative to it."""
    return [name for name in beside_adapter(folder)[0] if part_of(name) in {TOKENIZER, TEMPLATE}]


def read(folder: Path) -> TokenizerFiles:
    """The tokenizer in `folder`.

    Raises:
        NotFound: There is none.
        FormatError: A file of it is damaged.
        Unsupported: It lies in a file that only its own library reads.
    """
    config = _optional(folder / CONFIG)
    special = {} if "added_tokens_decoder" in config else _optional(folder / SPECIAL)
    vocabulary = next((name for name in _VOCABULARIES if (folder / name).is_file()), None)
    if vocabulary is None:
        raise _none_readable(folder)
    path = folder / vocabulary
    listed: list[tuple[AddedToken, int | None]] = []
    if vocabulary == FAST:
        pieces, listed = _read_fast(path)
    elif vocabulary == "tokenizer.model":
        pieces, listed = _read_sentencepiece(path, config)
    elif vocabulary == "vocab.json":
        pieces = _numbered(read_json(path), path)
    else:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        pieces = {line.rstrip(): number for number, line in enumerate(lines)}
    specials = tuple(_specials(config | special))
    files = TokenizerFiles(folder, vocabulary, pieces, {}, pieces, specials)
    files = files.extended(token for token, _ in listed)
    files = files.extended(_listed_beside(folder, config, {token.content for token in specials}))
    files = files.extended(token for token in specials if token.content not in files.added)
    odd = [(t.content, n) for t, n in listed if n is not None and files.numbers[t.content] != n]
    notes = [
        f"{path} numbers {content!r} {number}; loading it gives {files.numbers[content]}"
        for content, number in odd[:1]
    ]
    return replace(files, changed=False, notes=tuple(notes))


def _read_fast(path: Path) -> tuple[dict[str, int], list[tuple[AddedToken, int | None]]]:
    text = read_text(path)
    vocabulary, _, _ = member(text, "vocab", path)
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in order
        try:
            pieces = {entry[0]: number for number, entry in enumerate(vocabulary)}
        except (TypeError, IndexError, KeyError):
            raise FormatError(f"{path}: model.vocab is not a list of pieces and scores") from None
    elif isinstance(vocabulary, dict):
        pieces = _numbered(vocabulary, path)
    else:
        raise FormatError(f"{path} has no model.vocab", _save_as_json(path.parent))
    entries, _, _ = member(text, "added_tokens", path)
    try:
        added = [(added_token(entry), int(entry["id"])) for entry in entries or []]
    except (TypeError, KeyError, ValueError):
        raise FormatError(f"{path}: added_tokens is not a list of tokens with their ids") from None
    return pieces, list(added)


def read_text(path: Path) -> str:
    """The text of a tokenizer.json.

    Raises:
        FormatError: It is cut off, or no text.
    """
    try:
        text = path.read_bytes().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: byte {error.start} is not UTF-8", _AGAIN) from None
    if not (text.startswith("{") and text.endswith("}")):
        raise FormatError(f"{path} is not a whole JSON object", _AGAIN)
    return text


def member(text: str, key: str, path: Path) -> tuple[Any, int, int]:
    """The list or object under `key` anywhere in JSON, and where it starts and ends.

    The merges of a BPE model are half of its file, and which tokens there are does not depend on
    them. Inside a string the quotes around `key` would have backslashes before them.

    Raises:
        FormatError: It is damaged.
    """
    found = re.search(rf'"{key}"\s*:\s*(?=[\[{{])', text)
    if found is None:
        return None, -1, -1
    try:
        value, stop = json.JSONDecoder().raw_decode(text, found.end())
    except (ValueError, RecursionError):
        line = text.count("\n", 0, found.end()) + 1
        raise FormatError(f"{path}: {key}, on line {line}, is not JSON", _AGAIN) from None
    return value, found.end(), stop


def _read_sentencepiece(
    path: Path, config: Mapping[str, Any]
) -> tuple[dict[str, int], list[tuple[AddedToken, int | None]]]:
    kind = str(config.get("tokenizer_class", "Llama"))
    if kind.removesuffix("Fast").removesuffix("Tokenizer") not in _PLAIN_SENTENCEPIECE:
        raise Unsupported(f"{path} is read by {kind}'s own code only", _save_as_json(path.parent))
    pieces = read_pieces(path)
    control, user_defined = 3, 4
    listed: list[tuple[AddedToken, int | None]] = [
        (AddedToken(piece, normalized=False, special=kind == control), number)
        for number, (piece, kind) in enumerate(pieces)
        if kind in (control, user_defined)
    ]
    return {piece: number for number, (piece, _) in enumerate(pieces)}, listed


def _numbered(vocabulary: Mapping[str, Any], path: Path) -> dict[str, int]:
    wrong = [piece for piece, n in vocabulary.items() if type(n) is not int or n < 0]
    if wrong:
        number = vocabulary[wrong[0]]
        raise FormatError(f"{path}: the number of {wrong[0]!r} is {number!r}, not a whole number")
    return dict(vocabulary)


def _listed_beside(
    folder: Path, config: Mapping[str, Any], specials: Collection[str]
) -> list[AddedToken]:
    """What tokenizer_config.json and, in older folders, added_tokens.json add."""
    if (listed := config.get("added_tokens_decoder")) is not None:
        try:
            return [added_token(listed[number]) for number in sorted(listed, key=int)]
        except (TypeError, KeyError, ValueError):
            where = f"{folder / CONFIG}: added_tokens_decoder"
            raise FormatError(f"{where} is not an object of ids with their tokens") from None
    older = _numbered(_optional(folder / ADDED), folder / ADDED)
    return [
        AddedToken(token, normalized=token not in specials, special=token in specials)
        for token in sorted(older, key=older.__getitem__)
    ]


def _specials(config: Mapping[str, Any]) -> Iterable[AddedToken]:
    """What a tokenizer's config names as special, such as `eos_token`; each once."""
    named = [f"{name}_token" for name in _NAMED]
    named += [key for key in config if key.endswith("_token") and key not in named]
    values = [config.get(key) for key in named]
    for key in _EXTRA:
        extra = config.get(key) or []
        values += extra.values() if isinstance(extra, dict) else extra
    tokens: dict[str, AddedToken] = {}
    for value in values:
        if isinstance(value, str) and value:
            tokens.setdefault(value, AddedToken(value, normalized=False, special=True))
        elif isinstance(value, dict) and isinstance(value.get("content"), str):
            tokens.setdefault(value["content"], replace(added_token(value), special=True))
    return tokens.values()


def added_token(entry: Mapping[str, Any]) -> AddedToken:
    """From tokenizer.json or a config.

    Raises:
        KeyError: It has no content.
        TypeError: It is no object.
    """
    special = bool(entry.get("special", False)) if isinstance(entry, dict) else False
    return AddedToken(
        str(entry["content"]),
        **{key: bool(entry.get(key, False)) for key in ("single_word", "lstrip", "rstrip")},
        normalized=bool(entry.get("normalized", not special)),
        special=special,
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _none_readable(folder: Path) -> NotFound | Unsupported:
    names = tokenizer_names(folder) if folder.is_dir() else []
    if any(name.endswith((".model", ".tiktoken", ".spm", "tekken.json")) for name in names):
        found = ", ".join(names)
        hint = _save_as_json(folder)
        return Unsupported(f"{folder} has no tokenizer.json, and only {found}", hint)
    return NotFound(
        f"{folder} has no tokenizer",
        "copy the tokenizer's files there (tokenizer.json, tokenizer_config.json); if it is the"
        " same for all models, the recipe needs no `tokenizer`",
    )


def _save_as_json(folder: Path) -> str:
    return (
        'write a tokenizer.json with transformers: python -c "from transformers import'
        f" AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def entry_of(token: AddedToken, number: int | None = None) -> dict[str, Any]:
    """As in tokenizer.json, or without the number as in the configs."""
    entry: dict[str, Any] = {} if number is None else {"id": number}
    for name in _FIELDS:  # asdict is slow, and a union may add 10⁵ tokens
        entry[name] = getattr(token, name)
    return entry


def dumped(content: Mapping[str, Any], *, compact: bool = False) -> str:
    """JSON text; `compact` where it is long, since only that is fast."""
    indent = None if compact else 2
    return json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
