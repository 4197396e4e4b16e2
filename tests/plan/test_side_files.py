"""What stands beside the weights of the output: whose it is, and what is said of it."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import weft
from weft.formats.side_files import is_vocabulary, part_of

if TYPE_CHECKING:
    from conftest import Folders

    from weft.api import MergePlan

# What trainers leave beside an adapter, of which nobody needs to hear.
LEFTOVERS = {
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"),
    *("trainer_state.json", "training_args.bin", "README.md", ".gitattributes", "latest"),
    *("all_results.json", "global_step7/mp_rank_00.pt", "checkpoint-7/adapter_model.safetensors"),
    *("runs/log.txt", "adapter_model.bin", "zero_to_fp32.py", "optimizer_0/x.distcp"),
}


def sources(made: MergePlan) -> dict[str, str | None]:
    """File -> name of the folder that it is copied from."""
    root = made.inputs.base.folder.rpartition("/")[0]
    return {
        side.name: side.source and side.source.removeprefix(root + "/").partition("/")[0]
        for side in made.plan.side_files
        if side.name != "config.json"
    }


def plan(folders: Folders, base: dict[str, str], *adapters: dict[str, str]) -> MergePlan:
    """The plan of a base and adapters with these files beside them; `one`, `two` … by name."""
    made = [
        folders.adapter(name=name, files=files)
        for name, files in zip(("one", "two"), adapters, strict=False)
    ]
    return weft.plan_merge(folders.base(files=base), made)


@pytest.mark.parametrize(
    ("name", "part", "vocabulary"),
    [
        ("tokenizer.json", "tokenizer", True),
        ("tokenizer.model", "tokenizer", True),
        ("spm.model", "tokenizer", True),
        ("sentencepiece.bpe.model", "tokenizer", True),
        ("source.spm", "tokenizer", True),
        ("qwen.tiktoken", "tokenizer", True),
        ("tekken.json", "tokenizer", True),
        ("merges.txt", "tokenizer", False),
        ("tokenizer_config.json", "tokenizer", False),
        ("chat_template.jinja", "chat template", False),
        ("chat_template.json", "chat template", False),
        ("tools.jinja", "chat template", False),
        ("additional_chat_templates/rag.jinja", "chat template", False),
        ("preprocessor_config.json", "processor", False),
        ("processor_config.json", "processor", False),
        ("video_preprocessor_config.json", "processor", False),
        ("config.json", None, False),
        ("0_Transformer/tokenizer.json", None, False),
        ("0_Transformer/spm.model", None, False),
        ("tokenization_qwen.py", None, False),
    ],
)
def test_what_a_file_is_part_of(name: str, part: str | None, vocabulary: bool) -> None:
    assert (part_of(name), is_vocabulary(name)) == (part, vocabulary)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "qwen.tiktoken", "spm.model", "source.spm", "tokenizer.model"]
)
def test_a_tokenizer_of_any_kind_is_the_adapters(name: str, folders: Folders) -> None:
    """All of it: what the base has under other names would be another tokenizer."""
    theirs = {"tokenizer.json": "{}", "merges.txt": "", "vocab.json": "{}", "notes.txt": "kept"}
    own = {name: "own", "tokenizer_config.json": "{}", "special_tokens_map.json": "{}"}
    made = plan(folders, theirs, own)
    assert sources(made) == dict.fromkeys(own, "one") | {"notes.txt": "base"}
    assert any(note == f"tokenizer from {folders.root}/one" for note in made.plan.beside)


def test_the_bases_template_stays_where_the_adapter_brings_none(folders: Folders) -> None:
    base = {"tokenizer.json": "{}", "chat_template.jinja": "base's"}
    made = plan(folders, base, {"tokenizer.json": "{}"})
    assert sources(made) == {"tokenizer.json": "one", "chat_template.jinja": "base"}
    root = folders.root
    assert f"tokenizer from {root}/one, chat template from {root}/base" in made.plan.beside


def test_a_template_inside_the_adapters_tokenizer(folders: Folders) -> None:
    """A file of the base's would take its place when the tokenizer is loaded."""
    base = {"tokenizer.json": "{}", "chat_template.jinja": "base's"}
    own = {"tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": "own"}'}
    made = plan(folders, base, own)
    assert sources(made) == dict.fromkeys(own, "one")
    assert f"tokenizer and chat template from {folders.root}/one" in made.plan.beside


def test_a_template_alone(folders: Folders) -> None:
    base = {"tokenizer.json": "{}", "chat_template.json": "base's"}
    own = {"chat_template.jinja": "own", "additional_chat_templates/rag.jinja": "own"}
    made = plan(folders, base, own)
    assert sources(made) == dict.fromkeys(own, "one") | {"tokenizer.json": "base"}
    root = folders.root
    assert f"tokenizer from {root}/base, chat template from {root}/one" in made.plan.beside


def test_a_processor(folders: Folders) -> None:
    """File by file: one is for images and another for sound."""
    base = {"preprocessor_config.json": "base's", "processor_config.json": "base's"}
    made = plan(folders, base, {"preprocessor_config.json": "own"})
    assert sources(made) == {"preprocessor_config.json": "one", "processor_config.json": "base"}
    assert f"processor from {folders.root}/one" in made.plan.beside


def test_what_the_merge_writes(folders: Folders) -> None:
    own = {"qwen.tiktoken": "own", "additional_chat_templates/rag.jinja": "own"}
    base = folders.base(files={"tokenizer.json": "{}", "preprocessor_config.json": "base's"})
    weft.merge(base, folders.adapter(files=own), output=folders.root / "out")
    out = folders.root / "out"
    for name in own:
        assert (out / name).read_text() == "own"
    assert (out / "preprocessor_config.json").read_text() == "base's"
    assert not (out / "tokenizer.json").exists()


def test_what_is_copied_is_in_the_manifest(folders: Folders) -> None:
    """As an input like any other: whose it is, and a digest of all of it."""
    base = folders.base(files={"tokenizer.json": "{}", "merges.txt": "x", "NOTICE": "whose"})
    adapter = folders.adapter(files={"spm.model": "own", "left.bin": ""})
    report = weft.merge(base, [f"{adapter}:0.5", f"{adapter}:0.5"], output=folders.root / "out")
    entries = {
        Path(e["file"]).name: e for e in report.manifest["inputs"] if "header_sha256" not in e
    }
    assert {name: entry["role"] for name, entry in entries.items()} == {
        "config.json": "base",
        "NOTICE": "base",
        "adapter_config.json": "adapter 2",
        "spm.model": "adapter 1",
    }
    for entry in entries.values():
        content = Path(entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), sha256(content).hexdigest())


def test_two_adapters_each_with_a_part(folders: Folders) -> None:
    made = plan(
        folders,
        {"tokenizer.json": "{}"},
        {"tokenizer.json": "{}"},
        {"chat_template.jinja": "own", "preprocessor_config.json": "own"},
    )
    assert sources(made) == {
        "tokenizer.json": "one",
        "chat_template.jinja": "two",
        "preprocessor_config.json": "two",
    }
    root = folders.root
    assert made.plan.beside[0] == (
        f"tokenizer from {root}/one, chat template and processor from {root}/two"
    )


def test_two_adapters_that_differ(folders: Folders) -> None:
    """The first one's tokenizer; and no template that would be inside the other's."""
    inside = {"tokenizer.json": "2", "tokenizer_config.json": '{"chat_template": "two"}'}
    base = {"tokenizer.json": "{}", "chat_template.jinja": "base's"}
    made = plan(folders, base, {"tokenizer.json": "1"}, inside)
    assert sources(made) == {"tokenizer.json": "one", "chat_template.jinja": "base"}
    (note,) = [note for note in made.plan.beside if "s differ: " in note]
    root = folders.root
    assert note == f"tokenizers differ: {root}/one's is used, and not that of {root}/two"


def test_two_adapters_that_do_not_differ(folders: Folders) -> None:
    same = {"tokenizer.json": "{}", "chat_template.jinja": "x"}
    made = plan(folders, {}, same, same)
    assert made.plan.beside == (f"tokenizer and chat template from {folders.root}/one",)


def test_what_is_not_copied_is_named(folders: Folders) -> None:
    """A tokenizer's config without a vocabulary, code, and what nobody knows; on one line."""
    others = ("tokenizer_config.json", "tokenization_x.py", "notes.bin", "merged/x.json")
    made = plan(folders, {}, dict.fromkeys({*others, *LEFTOVERS}, "{}"))
    names = "merged/, notes.bin, tokenization_x.py, tokenizer_config.json"
    assert made.plan.beside == (f"not copied from {folders.root}/one: {names}",)
    assert sources(made) == {}


def test_leftovers_of_the_training_are_not(folders: Folders) -> None:
    made = plan(folders, {}, dict.fromkeys(LEFTOVERS, ""))
    assert made.plan.beside == ()


def test_an_adapter_of_weight_zero_brings_nothing(folders: Folders) -> None:
    adapter = folders.adapter(files={"tokenizer.json": "own", "other.bin": ""})
    made = weft.plan_merge(folders.base(files={"tokenizer.json": "{}"}), f"{adapter}:0")
    assert sources(made) == {"tokenizer.json": "base"}
    assert not any("other.bin" in note for note in made.plan.beside)


@pytest.mark.parametrize(("own", "old"), [("other.jinja", True), ("spm.model", False)])
def test_new_rows_with_the_old_tokenizer(own: str, old: bool, folders: Folders) -> None:
    base = folders.base(["embed_tokens"], files={"tokenizer.json": "{}"}, vocab_size=8)
    adapter = folders.adapter([], {"embed_tokens.weight": torch.ones(10, 8)}, files={own: ""})
    notes = weft.plan_merge(base, adapter).plan.beside
    assert any("tokenizer is still the base's" in note for note in notes) == old
