"""What `weft run` says of a recipe that is sound by itself, and of what it has made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from running import checkpoint, llama, lora
from safetensors.torch import save_file

import weft
from weft.cli.app import main
from weft.core.errors import WeftError

if TYPE_CHECKING:
    from pathlib import Path

LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 1}\n"
TIES = "merge_method: ties\nbase_model: base\nmodels: [model: a, model: b]\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, and `a` and `b` tuned from it; the working folder."""
    for number, name in enumerate(("base", "a", "b")):
        checkpoint(tmp_path / name, llama(number or None))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(root: Path, text: str) -> str:
    (root / "recipe.yml").write_text(text)
    with pytest.raises(WeftError) as error:
        weft.plan_run("recipe.yml")
    assert error.value.exit_code == 2
    return f"{error.value}\n{error.value.hint or ''}"


def said_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------- refused


def test_an_adapter_whose_base_is_not_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what it is, which base it names, and how to write where that is."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    lora(root / "adapter", 1, rms=1e-3, base="./no/such/base")
    lora(root / "nameless", 1, rms=1e-3)
    message = refused(root, LINEAR.replace("model: b", "model: adapter"))
    assert "adapter is an adapter, whose config names the base ./no/such/base: " in message
    assert "@ models[1], line 2, column 20" in message
    assert "write where its base is: path/of/the/base+adapter" in message
    message = refused(root, LINEAR.replace("model: b", "model: nameless"))
    assert "nameless is an adapter, and does not say of which base model  @ models[1]" in message
    assert "path/of/the/base+nameless" in message


def test_filters_that_leave_tensors_without_a_value(root: Path) -> None:
    """Said once, with the place of the filters and one of the tensors."""
    text = f"{TIES}parameters:\n  density: 0.5\n  weight:\n    - {{filter: self_attn, value: 1}}\n"
    message = refused(root, text)
    assert message.startswith("2 problems in recipe.yml\n")
    for name in ("a", "b"):
        what = f'no "weight" of {name} for lm_head.weight and 4 tensors more'
        assert f"{what}: the filters of the recipe are of others" in message
    assert "@ parameters.weight, line 6, column 3" in message
    assert "`- value: 0.5`" in message
    own = "models:\n  - {model: a, parameters: {weight: 1}}\n  - model: b\n    parameters:\n"
    own += "      weight: [{filter: layers, value: 1}]\n"
    message = refused(root, f"merge_method: ties\nbase_model: base\n{own}")
    assert message.startswith("1 problem in")
    assert "@ models[1].parameters.weight, line 7, column 7" in message


def test_a_gradient_of_fractions(root: Path) -> None:
    text = "merge_method: karcher\nmodels: [model: a, model: b]\nparameters: {max_iter: [1, 2]}\n"
    for layers in (3,):
        for name in ("a", "b"):
            checkpoint(root / f"{name}{layers}", llama(1, layers=layers))
    message = refused(root, text.replace("model: a", "model: a3").replace("model: b", "model: b3"))
    assert 'the gradient of "max_iter" is 1.5 for model.layers.1.' in message
    assert "line 2" in message


@pytest.mark.parametrize(
    ("layers", "cure"), [("[0, 9]", "[0, 2]"), ("[1, 3]", "[1, 2]"), ("[5, 9]", "[0, 2]")]
)
def test_layers_that_the_model_has_not(layers: str, cure: str, root: Path) -> None:
    text = f"merge_method: passthrough\nslices: [sources: [{{model: a, layer_range: {layers}}}]]\n"
    message = refused(root, text)
    assert f"layer_range {layers} reaches past the 2 layers of a" in message
    assert "@ slices[0].sources[0].layer_range, line 2, column 31" in message
    assert f"its last layer is 1: layer_range: {cure}" in message


def test_weights_are_no_recipe(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by(["run", "a/model.safetensors", "-o", "out"], capsys)
    assert "error: a/model.safetensors is a file of weights, not a recipe\n" in said
    assert "hint: name it under `models:` of a recipe" in said
    (root / "noise.yml").write_bytes(b"merge_method: \xff\n")
    said = said_by(["run", "noise.yml", "--check"], capsys)
    assert "error: noise.yml is no text, and so no recipe: byte 14 is not UTF-8\n" in said


@pytest.mark.parametrize(
    ("name", "near"), [("nonsense", None), ("dare-ties", "dare_ties"), ("Slrp", "slerp")]
)
def test_a_method_that_is_not_there(
    name: str, near: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The nearest name, if any is near, and all of them."""
    said = said_by(["methods", name], capsys)
    assert f"there is no merge method '{name}'" in said
    assert (f"did you mean {near}?" in said) == (near is not None)
    assert "there are: arcee_fusion, breadcrumbs, " in said


def test_a_size_below_zero(capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by(["extract", "a", "--base", "b", "-o", "c", "--size", "-5MB"], capsys)
    assert said.startswith("error: --size -5MB: there is no such value below zero\n")
    said = said_by(["extract", "a", "--base", "b", "-o", "c", "--size"], capsys)
    assert said.startswith("error: --size needs a value behind it\n")


# ---------------------------------------------------------------------------------------- notes


def test_only_files_that_are_there_are_said_to_be_taken(root: Path) -> None:
    def taken(text: str) -> list[str]:
        (root / "recipe.yml").write_text(text)
        plan = weft.plan_run("recipe.yml").plan
        return [note for note in plan.beside if " from a" in note]

    assert taken(LINEAR) == ["config from a"]
    (root / "a/tokenizer.json").write_text("{}")
    assert taken(LINEAR) == ["config and tokenizer from a"]
    (root / "a/chat_template.jinja").write_text("{{ messages }}")
    assert taken(LINEAR) == ["config, tokenizer and chat template from a"]
    assert taken(LINEAR + "chat_template: chatml\n") == ["config and tokenizer from a"]
    (root / "a/config.json").unlink()
    assert taken(LINEAR) == ["tokenizer and chat template from a"]
    for name in ("a", "b"):
        save_file(llama(1), root / f"{name}.safetensors")
    assert taken(LINEAR.replace("a,", "a.safetensors,").replace("b]", "b.safetensors]")) == []
