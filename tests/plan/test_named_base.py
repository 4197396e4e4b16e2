"""The base that the adapter names, and the one that is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import weft
from weft.cli.app import main
from weft.formats.hub import repository

if TYPE_CHECKING:
    from conftest import Folders

    from weft.core.specs import Plan

CACHE = "hub/models--meta-llama--Llama-3.1-8B/snapshots/0123abcd"  # where the hub's client puts it


def plan(folders: Folders, base: str, named: Any, weight: str = "", **config: Any) -> Plan:
    """Of the base in the folder `base` and an adapter that names another."""
    adapter = folders.adapter(base_model_name_or_path=named)
    return weft.plan_merge(folders.base(name=base, **config), f"{adapter}{weight}").plan


def said(plan: Plan) -> list[str]:
    return [text for text in (*plan.notes, *plan.warnings) if "as its base" in text]


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("org/name", "org/name"),
        ("org/name@main", "org/name"),
        ("org/name/checkpoint-7@main", "org/name"),
        ("/home/me/.cache/huggingface/hub/models--org--na-me/snapshots/0123", "org/na-me"),
        ("/cache/models--org--name", "org/name"),
        (r"C:\hub\models--org--name\snapshots\0", "org/name"),
        ("/cache/models--gpt2/snapshots/0", "gpt2"),
        ("/data/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("~/name", None),
        ("gpt2", None),
        ("models/llama", None),
        ("outputs/run-7", None),
        (r"C:\models\llama", None),
        ("", None),
        ("x" * 5000 + "/y", "x" * 5000 + "/y"),
        ("a/b\0c", None),
    ],
)
def test_repository(text: str, repo: str | None) -> None:
    assert repository(text) == repo


def test_repository_that_is_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert repository("org/name") is None


@pytest.mark.parametrize(
    "named",
    [
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.2-8B",
        "meta-llama/Llama-3.1-70B",
        "Qwen/Qwen2.5-7B",
        "/somebody/hub/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/9",
    ],
)
def test_another_repository(named: str, folders: Folders) -> None:
    """Of a chat model and its base model the shapes are the same."""
    found = plan(folders, CACHE, named)
    (warning,) = said(found)
    assert found.warnings == (warning,)
    assert f"/adapter names {named} as its base, and {folders.root}/{CACHE} is another" in warning
    assert "give that one as the base" in warning


@pytest.mark.parametrize(
    "named",
    [
        None,
        "meta-llama/Llama-3.1-8B",
        "meta-llama/llama-3.1-8b",
        "meta-llama/Llama-3.1-8B@v2",
        "/somebody/hub/models--meta-llama--Llama-3.1-8B/snapshots/9",
        "/data/Llama-3.1-8B",
        "/data/llama",
        "/data/llama-8b/",
        "./models/run-7",
        "outputs/checkpoint-200",
        r"C:\models\Llama-3.1-8B",
    ],
)
def test_the_same_repository(named: Any, folders: Folders) -> None:
    """In another spelling or place, or by a name that says nothing."""
    assert said(plan(folders, CACHE, named)) == []


@pytest.mark.parametrize(
    "named",
    [
        "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
        "unsloth/llama-3.1-8b-unsloth-bnb-4bit",
        "NousResearch/Llama-3.1-8B",
        "meta-llama/Meta-Llama-3.1-8B",
    ],
)
def test_a_copy_of_the_repository(named: str, folders: Folders) -> None:
    """Trained on the quantised one, merged into the other: as it should be."""
    found = plan(folders, CACHE, named)
    (note,) = said(found)
    assert note in found.notes
    assert note.endswith("is taken for a copy of that")


@pytest.mark.parametrize(
    ("folder", "named"),
    [
        ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B"),
        ("llama-70b", "meta-llama/Llama-3.1-8B"),
        ("qwen-8b", "/data/Llama-3.1-8B"),
        (CACHE, "/data/Llama-3.1-8B-Instruct"),
        (CACHE, "models/llama-merged"),
    ],
)
def test_a_folder_of_another_name(folder: str, named: str, folders: Folders) -> None:
    found = plan(folders, folder, named)
    (note,) = said(found)
    assert note in found.notes
    assert note.endswith("is called otherwise: make sure that it is that model")


@pytest.mark.parametrize(
    ("folder", "named"),
    [
        ("base", "meta-llama/Llama-3.1-8B"),
        ("llama", "meta-llama/Llama-3.1-8B"),
        ("llama-3.1-8b-hf", "meta-llama/Llama-3.1-8B"),
        ("Llama-3.1-8B", "/data/Llama-3.1-8B"),
        ("smollm2-135m-instruct-v1", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("llama-8b-20260131", "meta-llama/Llama-3.1-8B"),
        ("checkpoint-200", "/data/checkpoint-400"),
        ("gpt2", "openai-community/gpt2"),
        ("merged", "gpt2"),
    ],
)
def test_a_folder_of_which_nothing_is_known(folder: str, named: str, folders: Folders) -> None:
    assert said(plan(folders, folder, named)) == []


def test_a_folder_whose_config_says_what_it_is(folders: Folders) -> None:
    config = {"_name_or_path": "meta-llama/Llama-3.1-8B"}
    named = "meta-llama/Llama-3.1-8B"
    assert said(plan(folders, "llama-8b-mine", named, **config)) == []


def test_the_base_that_the_adapter_names_by_path(folders: Folders) -> None:
    base = folders.base(name="llama-8b-instruct")
    adapter = folders.adapter(base_model_name_or_path=str(base))
    assert said(weft.plan_merge(None, adapter).plan) == []
    assert said(weft.plan_merge(Path(base), adapter).plan) == []


def test_an_adapter_of_weight_zero_is_not_asked(folders: Folders) -> None:
    assert said(plan(folders, CACHE, "Qwen/Qwen2.5-7B", ":0")) == []


def test_each_adapter_is_asked(folders: Folders) -> None:
    base = folders.base(name=CACHE)
    for name in ("one", "two"):
        folders.adapter(name=name, base_model_name_or_path=f"Qwen/{name}")
    plan = weft.plan_merge(base, [folders.root / "one", folders.root / "two"]).plan
    assert [warning.split(" as its base")[0] for warning in plan.warnings] == [
        f"{folders.root}/{name} names Qwen/{name}" for name in ("one", "two")
    ]


def test_in_a_recipe_it_is_said_as_well(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what the shapes let through, the two names are all that tells; on the terminal, too."""
    base = folders.base(name=CACHE)
    fits = folders.adapter(name="fits", base_model_name_or_path="meta-llama/Llama-3.1-8B")
    other = folders.adapter(name="other", base_model_name_or_path="Qwen/Qwen2.5-7B")
    recipe = folders.root / "recipe.yml"
    text = f"merge_method: task_arithmetic\nbase_model: {base}\nparameters: {{weight: 1}}\n"
    text += f"models: [model: {base}+%s]\n"
    recipe.write_text(text % fits)
    assert said(weft.plan_run(recipe).plan) == []
    recipe.write_text(text % other)
    made = weft.plan_run(recipe)
    (warning,) = said(made.plan)
    assert warning in made.warnings
    assert warning.startswith(f"{other} names Qwen/Qwen2.5-7B as its base, and {base} is another")
    with pytest.raises(SystemExit) as end:
        main(["run", str(recipe), "-o", str(folders.root / "out"), "-q"])
    assert not end.value.code
    assert f"warning: {warning}" in capsys.readouterr().err
    assert warning in json.loads((folders.root / "out/weft.json").read_text())["warnings"]
