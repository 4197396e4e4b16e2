"""What the command line says of arguments and files that do not fit: own words, and the way out."""

from __future__ import annotations

import importlib
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

import pytest

from weft.cli.app import main

if TYPE_CHECKING:
    from tests.conftest import Folders


def run(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("command", "error", "hint"),
    [
        ("doctor", "no adapter given", "weft doctor ADAPTER"),
        ("doctor A B", "2 paths are given: A, B", "weft doctor A --base B"),
        ("doctor A --fix F", "2 paths are given: A, F", "weft doctor A --fix -o F"),
        ("doctor A B --fix -o F", "2 paths are given: A, B", "weft doctor A --base B"),
        ("doctor A --fix", "--fix needs a folder to write to", "weft doctor A --fix -o FIXED"),
        ("doctor A -o F", "-o is where --fix writes", "weft doctor A --fix -o F"),
        ("doctor A --base", "--base needs a value behind it", "weft doctor --help"),
        ("inspect", "PATH is missing", "weft inspect --help"),
        ("inspect A B C", "too many arguments: B C", "weft inspect --help"),
        ("merge A B", "--output is missing", "weft merge --help"),
    ],
)
def test_arguments(command: str, error: str, hint: str) -> None:
    code, out, err = run(*command.split())
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert second == f"hint: {hint}"


def test_a_base_in_place_of_an_adapter(folders: Folders) -> None:
    base = folders.base()
    code, _, err = run("doctor", base)
    assert code == 2
    assert f"{base} is a base model, not an adapter" in err
    assert "weft doctor ADAPTER --base BASE" in err


def test_an_adapter_in_place_of_a_base(folders: Folders) -> None:
    adapter = folders.adapter()
    code, _, err = run("doctor", adapter, "--base", folders.adapter(name="other"))
    assert code == 2
    assert "other is an adapter, not a base model" in err
    assert "give the model that it was trained on" in err


def test_a_config_that_was_lost(folders: Folders) -> None:
    base, adapter = folders.base(), folders.adapter()
    (adapter / "adapter_config.json").unlink()
    file = adapter / "adapter_model.safetensors"
    for command in (
        ("doctor", adapter),
        ("doctor", file),
        ("inspect", adapter),
        ("inspect", file),
        ("merge", base, adapter, "-o", folders.root / "out"),
    ):
        code, _, err = run(*command)
        assert code == 2
        assert "adapter_config.json" in err.splitlines()[0]
        assert "put the adapter_config.json of the training beside it" in err


def test_the_file_that_was_asked_for(folders: Folders) -> None:
    base, adapter = folders.base(), folders.adapter()
    for path in (base, base / "model.safetensors", adapter / "adapter_model.safetensors"):
        code, out, _ = run("inspect", path)
        assert code == 0
        shown = dict(line.split("  ", 1) for line in out.splitlines())["path"]
        assert shown.strip() == str(path)
        assert json.loads(run("inspect", path, "--json")[1])["path"] == str(path)


@pytest.mark.parametrize(
    ("config", "kind", "why"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING, rank 2", "no weight"),
        ({"peft_type": "NEW_KIND"}, "NEW_KIND, rank 2", "this release of weft merges"),
        ({"r": 3}, "LORA, rank 3", "says r = 3"),
        ({"alora_invocation_tokens": [1]}, "LORA, rank 2", "no merged weight"),
    ],
)
def test_what_cannot_be_merged_is_described(
    config: dict[str, object], kind: str, why: str, folders: Folders
) -> None:
    """By `inspect`, and by `doctor` with the same lines above what it found."""
    adapter = folders.adapter(base_model_name_or_path="org/base", **config)
    code, out, err = run("inspect", adapter)
    assert (code, err) == (0, "")
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert lines["kind"].strip() == f"adapter, {kind}"
    assert lines["base"].strip() == "org/base"
    assert lines["size"].strip() == "32 parameters, 128 B"
    assert why in lines["not merged"]
    content = json.loads(run("inspect", adapter, "--json")[1])
    assert why in content["obstacles"][0]["what"]
    code, out, _ = run("doctor", adapter)
    assert code == 2
    assert f"adapter, {kind}" in out
    assert "32 parameters" in out
    assert out.count(why) == 1


def test_broken_headers_are_still_errors(folders: Folders) -> None:
    adapter = folders.adapter(peft_type="PROMPT_TUNING")
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")
    code, out, err = run("inspect", adapter)
    assert (code, out) == (2, "")
    assert "PROMPT_TUNING" in err


def test_quiet_doctor(folders: Folders) -> None:
    """The exit code is the answer."""
    adapter = folders.adapter(r=3)
    assert run("doctor", adapter, "-q") == (2, "", "")
    sound = folders.adapter(name="sound")
    assert run("doctor", sound, "-q") == (0, "", "")
    code, out, err = run("doctor", sound, "-q", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["verdict"] == "sound"


@pytest.mark.parametrize("width", ["60", "80", "120"])
@pytest.mark.parametrize("command", ["merge", "doctor", "run"])
def test_examples_are_lines(command: str, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, _ = run(command, "--help")
    assert code == 0
    examples = out.partition("For example:")[2].partition("╭")[0].splitlines()
    shown = [line.strip(" •") for line in examples if line.strip()]
    assert len(shown) == 3
    assert all(line.startswith(f"weft {command} ") for line in shown)


@pytest.mark.parametrize(
    ("command", "words"),
    [("extract", "(*norm*)"), ("resize", "\n • weft resize ADAPTER --energy")],
)
def test_help_keeps_what_markdown_would_take(command: str, words: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert words in out


@pytest.mark.parametrize(
    ("line", "place", "hinted"),
    [
        ("extract T --base B -o OUT --rank 4", "weft.api.extract.run_extraction", True),
        ("resize A -o OUT --rank 4", "weft.api.resize.resize", False),
    ],
)
def test_an_interrupt_advises_resume_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, line: str, place: str, hinted: bool
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    module, _, name = place.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, interrupted)
    code, _, err = run(*line.split())
    assert code == 130
    assert "interrupted" in err
    assert ("--resume" in err) == hinted
