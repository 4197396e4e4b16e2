"""YAML as plain data, with the line and column of every key and every entry of a list."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from weft.core.errors import FormatError
from weft.core.units import clean

Loc = tuple[str | int, ...]

_MOST = 50_000  # values; aliases of aliases multiply
_TAG = "tag:yaml.org,2002:"
_KINDS = {"null", "bool", "int", "float", "str", "timestamp"}


@dataclass(slots=True)
class Document:
    """One document of a file.

    Attributes:
        data: Dictionaries with keys of text, lists, and scalars.
        positions: Where each key or entry is, (line, column) from 1 on; `()` is the document.
        text: The whole file as it was given, with the other documents.
        mistakes: What YAML lets pass and a recipe cannot mean.
    """

    data: Any
    text: str
    positions: dict[Loc, tuple[int, int]] = field(default_factory=dict)
    mistakes: list[tuple[Loc, str]] = field(default_factory=list)


def place(loc: Loc) -> str:
    """`models[1].parameters.density`; keys that are no plain words are quoted."""
    text = ""
    for each in loc:
        if isinstance(each, int):
            text += f"[{each}]"
        elif re.fullmatch(r"[\w/-]+", each):
            text += ("." if text else "") + each
        else:
            text += f'["{clean(each)}"]'
    return text


def load(text: str, name: str) -> list[Document]:
    """The documents in `text` that say anything.

    Raises:
        FormatError: It is no YAML, or says nothing.
    """
    try:
        found = _documents(text, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = " ".join(part for part in (error.context, error.problem) if part)
        hint = "indent with spaces, the same number for what stands on one level"
        raise FormatError(f"no valid YAML in {name}{where}: {clean(what)}", hint) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise FormatError(
            f"no valid YAML in {name}, line {line}: it holds U+{int(error.character):04X}",
            "save the file as UTF-8 text",
        ) from None
    except RecursionError:
        raise FormatError(f"{name} is nested too deeply to be a recipe") from None
    if not found:
        raise FormatError(
            f"nothing in {name}", "a recipe has at least `merge_method:` and `models:`"
        )
    return found


def _documents(text: str, name: str) -> list[Document]:
    loader = yaml.SafeLoader(text)
    try:
        nodes = []
        while loader.check_node():
            nodes.append(cast("yaml.Node", loader.get_node()))
        documents = []
        for node in nodes:
            document = Document(None, text)
            document.data = _Reader(loader, document, name).read(node, ())
            if document.data is not None:
                documents.append(document)
        return documents
    finally:
        loader.dispose()


class _Reader:
    """Turns nodes into data."""

    def __init__(self, loader: yaml.SafeLoader, document: Document, name: str) -> None:
        self.loader, self.document, self.name = loader, document, name
        self.count = 0
        self.inside: set[int] = set()

    def read(self, node: yaml.Node, loc: Loc) -> Any:
        self.document.positions.setdefault(loc, _position(node))
        self._spend(node)
        if id(node) in self.inside:
            raise self._endless(node, "contains itself")
        self.inside.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, loc)
            if isinstance(node, yaml.SequenceNode):
                return [self.read(each, (*loc, i)) for i, each in enumerate(node.value)]
            return self._scalar(node, loc)
        finally:
            self.inside.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                for one, pair in self._merged(value, loc, 0).items():
                    merged.setdefault(one, pair)
                continue
            name = self._key(key, loc)
            if name is None:
                continue
            if name in own:
                first = _position(own[name][0])[0]
                self._mistake((*loc, name), key, f'"{name}" for a second time, after line {first}')
            own.setdefault(name, (key, value))
        found = {}
        for name, (key, value) in (merged | own).items():
            self.document.positions.setdefault((*loc, name), _position(key))
            found[name] = self.read(value, (*loc, name))
        return found

    def _merged(
        self, node: yaml.Node, loc: Loc, depth: int
    ) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """What `<<:` brings in: of several mappings, the first that has a key counts."""
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for part in parts:
            if not isinstance(part, yaml.MappingNode) or depth > 50:
                self._mistake(loc, node, "`<<` takes a mapping, or a list of them")
                continue
            for key, value in part.value:
                self._spend(key)
                if key.tag == _TAG + "merge":
                    for one, pair in self._merged(value, loc, depth + 1).items():
                        found.setdefault(one, pair)
                elif (name := self._key(key, loc)) is not None:
                    found.setdefault(name, (key, value))
        return found

    def _key(self, key: yaml.Node, loc: Loc) -> str | None:
        if isinstance(key, yaml.ScalarNode) and key.tag == _TAG + "str":
            return str(key.value)
        shown = f" {key.value}" if isinstance(key, yaml.ScalarNode) else ""
        self._mistake(loc, key, f"the key{shown} is no text: put it in quotes")
        return None

    def _scalar(self, node: yaml.Node, loc: Loc) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind not in _KINDS:
            self._mistake(loc, node, f"`{node.tag}` has no place in a recipe")
            return str(node.value)
        if kind in ("str", "timestamp"):  # a model may be called 2024-01-01
            return str(node.value)
        try:
            return self.loader.construct_object(node)
        except (ValueError, KeyError, OverflowError, yaml.YAMLError):
            self._mistake(loc, node, f"`{node.value}` is no {kind}")
            return str(node.value)

    def _spend(self, node: yaml.Node) -> None:
        self.count += 1
        if self.count > _MOST:
            raise self._endless(node, f"makes more than {_MOST} values")

    def _endless(self, node: yaml.Node, what: str) -> FormatError:
        line, column = _position(node)
        return FormatError(
            f"an anchor in {self.name}, line {line}, column {column}, {what}",
            "write it out without the alias",
        )

    def _mistake(self, loc: Loc, node: yaml.Node, what: str) -> None:
        self.document.positions[loc] = _position(node)
        self.document.mistakes.append((loc, what))


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
