"""The vocabulary of a recipe: which tokens, in which order, and whose rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from vocabulary_cases import CASES, GOLDENS, Case, code, write

from weft.formats.tokenizer import AddedToken, read
from weft.plan._vocabulary import Vocabulary, build
from weft.recipes.records import ModelName, Token, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weft.core.specs import Run, SideFile

GOLDEN = json.loads(Path(__file__).with_name(GOLDENS).read_text(encoding="utf-8"))
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def rule(settings: dict[str, Any]) -> Token:
    """A token's settings as a recipe's YAML has them."""
    source, force = settings.get("source"), settings.get("force", False)
    if not isinstance(source, dict):
        return Token(source=ModelName(source) if source else None, force=force)
    if source["kind"] == "zero":
        return Token(zero=True, force=force)
    token, number = source.get("token"), source.get("token_id")
    return Token(source=ModelName(source["model"]), token=token, token_id=number, force=force)


def vocabulary(case: Case, root: Path) -> Vocabulary:
    folders, sizes = {}, {}
    for name, (files, rows) in case.models.items():
        folders[ModelName(name)] = write(root / name, files, rows)
        sizes[ModelName(name)] = rows
    source = case.tokenizer["source"]
    tokenizer = Tokenizer(
        source=source if source in ("union", "base") else ModelName(source),
        tokens={token: rule(each) for token, each in case.tokenizer.get("tokens", {}).items()},
        pad_to_multiple_of=case.tokenizer.get("pad_to_multiple_of"),
    )
    return build(tokenizer, ModelName(case.base) if case.base else None, folders, sizes)


def table(runs: Iterable[Run], padding: int) -> list[float]:
    """What runs make of embeddings whose values tell model and row."""
    values: list[float] = []
    for run in runs:
        for i in range(run.count):
            rows = [code(model, first + i) for model, first in run.parts]
            values.append(sum(rows) / len(rows) if rows else 0.0)
    return values + [sum(values) / len(values)] * padding


def written(files: Iterable[SideFile], folder: Path) -> Path:
    folder.mkdir()
    for file in files:
        text = file.text if file.text is not None else Path(file.source or "").read_bytes()
        raw = text.encode() if isinstance(text, str) else text
        (folder / file.name).write_bytes(raw)
    return folder


def load(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_rows_are_mergekits(name: str, tmp_path: Path) -> None:
    """Its goldens know a token's number and, in every model's new table, its row."""
    case, golden = CASES[name], GOLDEN[name]
    made = vocabulary(case, tmp_path)
    output = written(made.files, tmp_path / "output")
    files = read(output)
    if files.vocabulary != "tokenizer.model":  # for which transformers needs sentencepiece
        assert load(output).get_vocab() == files.numbers
    tokens = sorted(files.numbers, key=files.numbers.__getitem__)
    assert made.rows == len(golden["tokens"])
    ordered = [token if token not in case.unordered else None for token in tokens]
    assert ordered == [t if t not in case.unordered else None for t in golden["tokens"]]
    assert set(tokens) == set(golden["tokens"])
    assert [str(model) for model in made.models] == list(case.models)
    tables = [table(made.runs[model], made.padding) for model in made.models]
    for number, token in enumerate(tokens):
        assert [t[number] for t in tables] == pytest.approx(golden["rows"][token]), token
    for t, padding in zip(tables, golden["padding"], strict=True):
        assert t[made.rows :] == pytest.approx(padding)
    flags = {
        entry[1]: AddedToken(**dict(zip(FLAGS, entry[1:], strict=True)))
        for entry in golden["added"]
    }
    assert files.added == flags
