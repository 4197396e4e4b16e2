"""The vocabulary of a recipe: which tokens, in which order, and whose rows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabulary_cases import CASES, GOLDENS, Case, added, bpe, code, write

from weft.core.errors import PlanError
from weft.core.specs import Run
from weft.formats.tokenizer import AddedToken, read
from weft.plan._vocabulary import Vocabulary, arranged, build
from weft.recipes.records import ModelName, Token, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vocabulary_cases import Files

    from weft.core.specs import SideFile

GOLDEN = json.loads(Path(__file__).with_name(GOLDENS).read_text(encoding="utf-8"))
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def rule(given: dict[str, Any]) -> Token:
    """What a recipe's YAML says of a token."""
    source, force = given.get("source"), given.get("force", False)
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


# ------------------------------------------------------------------- rules, for any vocabulary


@st.composite
def recipes(draw: st.DrawFn) -> Case:
    """Models with tokens in any order, some of them without a row, and rules over them."""
    names = ["m0", "m1", "m2"][: draw(st.integers(1, 3))]
    models: dict[str, tuple[Files, int]] = {}
    for name in names:
        pieces = draw(st.permutations("abcdefgh"))[: draw(st.integers(1, 8))]
        extra = draw(st.permutations(["<x>", "<y>", "<z>"]))[: draw(st.integers(0, 3))]
        tokens = [added(token, len(pieces) + i) for i, token in enumerate(extra)]
        count = len(pieces) + len(tokens)
        models[name] = (bpe(" ".join(pieces), *tokens), max(1, count + draw(st.integers(-2, 2))))
    rules: dict[str, Any] = {}
    for token in draw(st.sets(st.sampled_from(["a", "b", "<x>", "<new>"]))):
        source = {"kind": "zero"}
        if draw(st.booleans()):
            source = {"kind": "model_token", "model": draw(st.sampled_from(names)), "token_id": 0}
        rules[token] = {"source": source, "force": draw(st.booleans())}
    return Case(
        models,
        {"source": draw(st.sampled_from(["union", "base", names[-1]])), "tokens": rules}
        | {"pad_to_multiple_of": draw(st.sampled_from([None, 4]))},
        draw(st.sampled_from([None, *names])),
    )


def expected(case: Case, token: str) -> list[float]:
    """The row of a token in every model's new table: the rules as the guide states them."""
    own: list[float | None] = []
    for i, (files, rows) in enumerate(case.models.values()):
        content = files["tokenizer.json"]
        numbers = content["model"]["vocab"] | {
            t["content"]: t["id"] for t in content["added_tokens"]
        }
        number = numbers.get(token, rows)
        own.append(code(i, number) if number < rows else None)
    having = [value for value in own if value is not None]
    base = own[list(case.models).index(case.base)] if case.base else None
    default = base if base is not None else sum(having) / len(having) if having else 0.0
    rules = case.tokenizer["tokens"].get(token)
    if rules is not None:
        default = 0.0
        if rules["source"]["kind"] == "model_token":
            default = code(list(case.models).index(rules["source"]["model"]), 0)
        if rules["force"]:
            return [default] * len(own)
    return [default if value is None else value for value in own]


@given(recipes())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_row_follows_the_rules(case: Case) -> None:
    with TemporaryDirectory() as root:
        made = vocabulary(case, Path(root))
        numbers = read(written(made.files, Path(root, "output"))).numbers
    assert sorted(numbers.values()) == list(range(made.rows))
    assert all(sum(run.count for run in runs) == made.rows for runs in made.runs.values())
    tables = [table(made.runs[model], 0) for model in made.models]
    for token, number in numbers.items():
        assert [t[number] for t in tables] == pytest.approx(expected(case, token)), token
    assert (made.rows + made.padding) % (case.tokenizer["pad_to_multiple_of"] or 1) == 0
    assert made.padding < 4
    everywhere = {
        token
        for files, rows in case.models.values()
        for token, number in {
            **files["tokenizer.json"]["model"]["vocab"],
            **{t["content"]: t["id"] for t in files["tokenizer.json"]["added_tokens"]},
        }.items()
        if number < rows
    }
    if case.tokenizer["source"] == "union":
        assert set(numbers) == everywhere | set(case.tokenizer["tokens"])


def test_runs_are_few(tmp_path: Path) -> None:
    """Numbers that go on together are one run, whoever's rows they are."""
    words = [chr(0x4E00 + i) for i in range(3000)]
    a, b = bpe(" ".join(words[:2000])), bpe(" ".join([*words[500:2000], *words[2000:]]))
    made = vocabulary(Case({"a": (a, 2000), "b": (b, 2500)}, {"source": "union"}, "a"), tmp_path)
    own, other = made.runs[ModelName("a")], made.runs[ModelName("b")]
    assert own == (Run(2000, ((0, 0),)), Run(1000, ((1, 1500),)))
    assert other == (Run(500, ((0, 0),)), Run(2500, ((1, 0),)))


def test_a_part_of_the_models(tmp_path: Path) -> None:
    """Where slices begin with other models than they end with, each part has its own sources."""
    made = vocabulary(CASES["union on a base"], tmp_path)
    b, c = ModelName("b"), ModelName("c")
    runs = arranged(made.alignment, (b, c), None)
    tables = {model: table(runs[model], 0) for model in (b, c)}
    only_a = made.alignment.tokens.index("abc")
    only_b = made.alignment.tokens.index("<im>")
    assert [tables[m][only_a] for m in (b, c)] == [0, 0]
    assert [tables[m][only_b] for m in (b, c)] == [code(0, 9)] * 2


# ------------------------------------------------------------------------------ real tokenizers


TEXT = ["the weft goes over and under the warp", "a loom, a shuttle, a reed", "über — 织布"]


def trained(kind: str, size: int) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    models, trainers, pre = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    if kind == "bytes":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
        )
    elif kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre.Metaspace(), tokenizers.decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    else:
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre.Whitespace()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=["[UNK]"], show_progress=False
        )
    made.train_from_iterator(TEXT, trainer)
    return made


def of(made: Any) -> Files:
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": made.to_str(), "tokenizer_config.json": config}


@pytest.mark.parametrize("kind", ["bytes", "unigram", "wordpiece"])
def test_the_output_reads_text_as_its_base_does(kind: str, tmp_path: Path) -> None:
    """And knows the other model's tokens, each with the row that it has there."""
    base = trained(kind, 300)
    other = copy.deepcopy(base)
    base.add_special_tokens(["<s>"])
    other.add_special_tokens(["<|user|>", "<s>"])
    sizes = base.get_vocab_size() + 7, other.get_vocab_size()
    case = Case(
        {"base": (of(base), sizes[0]), "other": (of(other), sizes[1])}, {"source": "union"}, "base"
    )
    made = vocabulary(case, tmp_path)
    output = load(written(made.files, tmp_path / "output"))
    assert output.get_vocab().keys() == base.get_vocab().keys() | other.get_vocab().keys()
    for text in TEXT[:2]:
        assert output.encode(text, add_special_tokens=False) == base.encode(text).ids
    tokens = output.convert_ids_to_tokens(output.encode("<s><|user|>", add_special_tokens=False))
    assert tokens == ["<s>", "<|user|>"]
    tables = [table(made.runs[model], made.padding) for model in made.models]
    for token, number in output.get_vocab().items():
        for i, tokenizer in enumerate((base, other)):
            if (own := tokenizer.token_to_id(token)) is not None:
                assert tables[i][number] == code(i, own)
    assert any(f"{sizes[0]} rows for {sizes[0] - 7} tokens; 7 are padding" in n for n in made.notes)


def test_pieces_of_another_model_that_change_how_text_is_read(tmp_path: Path) -> None:
    """They cannot become pieces of the base's model: it is as MergeKit has it, and it is said."""
    made = vocabulary(CASES["wordpiece"], tmp_path)
    (note,) = (note for note in made.notes if "looked for in the text" in note)
    assert note.startswith("1 token ('##c') of other models")


# ---------------------------------------------------------------------- files, and what is said


def test_equal_tokenizers_are_copied_as_they_are(tmp_path: Path) -> None:
    made = vocabulary(CASES["union of equals"], tmp_path)
    assert {file.name for file in made.files} == {"tokenizer.json", "tokenizer_config.json"}
    assert all(file.source == f"{tmp_path}/a/{file.name}" for file in made.files)
    assert made.notes == ()
    assert made.runs == {ModelName("a"): (Run(9, ((0, 0),)),), ModelName("b"): (Run(9, ((1, 0),)),)}


def test_a_piece_without_a_row_goes_with_its_merges_and_its_mentions(tmp_path: Path) -> None:
    """MergeKit fails to load what it makes of this."""
    config = {"pad_token": "[PAD]", "eos_token": "</s>", "additional_special_tokens": ["[PAD]"]}
    files = bpe("a b c </s> ab abc", added("</s>", 3), added("[PAD]", 6), config=config)
    files["tokenizer.model"] = b"which would bring them back"
    made = vocabulary(Case({"a": (files, 5)}, {"source": "base"}, "a"), tmp_path)
    folder = written(made.files, tmp_path / "output")
    assert not (folder / "tokenizer.model").exists()
    output = load(folder)
    assert len(output) == made.rows == 5
    assert output.tokenize("abc") == ["ab", "c"]
    assert (output.eos_token, output.pad_token) == ("</s>", None)
    assert "a: beyond the 5 rows of its embedding: 2 tokens ('[PAD]', 'abc')" in made.notes
    assert any("tokenizer.model" in n for n in made.notes)


def test_a_token_that_is_added_to_the_base_has_the_row_that_the_recipe_names(
    tmp_path: Path,
) -> None:
    """And not the base's padding that lies at its number, as MergeKit has it."""
    rules = {"<new>": {"source": {"kind": "model_token", "model": "b", "token": "d"}}}
    case = Case({"a": (_a(), 16), "b": (_a(), 9)}, {"source": "base", "tokens": rules}, "a")
    made = vocabulary(case, tmp_path)
    assert made.rows == 10
    assert [table(made.runs[model], 0)[9] for model in made.models] == [code(1, 3)] * 2


def _a() -> Files:
    return CASES["union of equals"].models["a"][0]


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    rules = {"<nowhere>": {"force": False}}
    case = CASES["base"]
    made = vocabulary(Case(case.models, {"source": "base", "tokens": rules}, "c"), tmp_path)
    assert "a: not in the output's tokenizer, and lost: 2 tokens ('ab', 'abc')" in made.notes
    assert "in no model, and so rows of zeros: 1 token ('<nowhere>')" in made.notes


def test_all_tokenizers_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    damaged = _a() | {"tokenizer.json": '{"added_tokens": [], "model": {"vocab": {"a": 0,'}
    own_code: Files = {"tokenizer.model": b"x", "tokenizer_config.json": {"tokenizer_class": "Own"}}
    cut: Files = {"tokenizer.model": b"\x0a\xff"}
    half = _a() | {"tokenizer.json": '{"model": {"vocab": {"a": 0, "b" 1}}}'}
    words = _a() | {"tokenizer.json": '{"model": {"vocab": {"a": "0"}}}'}
    models = {"a": (_a(), 9), "none": ({}, 9), "damaged": (damaged, 9), "own": (own_code, 9)}
    models |= {"cut": (cut, 9), "half": (half, 9), "words": (words, 9)}
    with pytest.raises(PlanError) as error:
        vocabulary(Case(models, {"source": "union"}, "a"), tmp_path)
    said = [problem.what.replace(str(tmp_path), "…") for problem in error.value.problems]
    assert said == [
        "none: …/none has no tokenizer",
        "damaged: …/damaged/tokenizer.json is not a whole JSON object",
        "own: …/own/tokenizer.model is read by Own's own code only",
        "cut: …/cut/tokenizer.model is no sentencepiece model",
        "half: …/half/tokenizer.json: vocab, on line 1, is not JSON",
        "words: …/words/tokenizer.json: the number of 'a' is '0', not a whole number",
    ]
    assert all(problem.hint for problem in error.value.problems[:-1])


def test_all_tokens_without_a_row_are_named(tmp_path: Path) -> None:
    rules = {
        "<new>": {"source": {"kind": "model_token", "model": "b", "token": "abcd"}},
        "<newer>": {"source": {"kind": "model_token", "model": "a", "token_id": 9}},
        "<newest>": {"source": "a"},
        "<other>": {"source": "elsewhere"},
        "a": {"force": True},
    }
    case = Case({"a": (_a(), 9), "b": (_a(), 9)}, {"source": "b", "tokens": rules}, "a")
    with pytest.raises(PlanError) as error:
        vocabulary(case, tmp_path)
    what = [problem.what.partition("; ")[0] for problem in error.value.problems]
    assert what == [
        "token 'a' has `force` and no `source`",
        "token '<new>' takes its row from b, which has no 'abcd'",
        "token '<newer>' takes its row from a, row 9, and its embedding has the rows 0 to 8",
        "token '<newest>' takes its row from a, which has no '<newest>'",
        "token '<other>' takes its row from elsewhere, whose embedding is not merged",
    ]
    assert "nearest: 'abc'" in str(error.value)
    assert "those that are: a, b" in str(error.value)


def test_numbers_with_gaps_are_not_given_twice(tmp_path: Path) -> None:
    """The tokenizers library numbers added tokens from the count of the pieces on."""
    files = bpe("a b")
    files["tokenizer.json"]["model"]["vocab"] = {"a": 0, "b": 2}
    with pytest.raises(PlanError, match=r"'<x>', would get the number 2, which is that of 'b'"):
        vocabulary(Case({"a": (files, 4)}, {"source": "base", "tokens": {"<x>": {}}}), tmp_path)
    made = vocabulary(Case({"a": (files, 4)}, {"source": "base"}), tmp_path / "again")
    assert table(made.runs[ModelName("a")], 0) == [code(0, 0), 0, code(0, 2)]
    assert "1 rows of zeros for numbers that no token has" in made.notes
