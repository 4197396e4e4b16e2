"""What `weft run` says of a recipe that is sound by itself, and of what it has made."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
import torch
from running import MATRIX, checkpoint, llama, load, lora, run
from safetensors.torch import save_file

import weft
from weft import methods
from weft.cli.app import main
from weft.core.errors import NumericsError, WeftError

if TYPE_CHECKING:
    from pathlib import Path

LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 1}\n"
SCALED = """\
merge_method: passthrough
models: [model: a]
parameters: {scale: [{filter: q_proj, value: 0.5}, {value: 1}]}
"""
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


def test_layers_that_are_not_taken_are_no_misfit(root: Path) -> None:
    """What of two models is merged fits, whatever a third lacks."""
    name = f"{MATRIX.format(1)}.weight"
    odd = llama(3)
    checkpoint(root / "odd", odd | {name: odd[name][:32].contiguous()})
    first = "  - sources: [{model: a, layer_range: [0, 1]}, {model: odd, layer_range: [0, 1]}]\n"
    text = f"merge_method: linear\nparameters: {{weight: 1}}\nslices:\n{first}"
    (root / "recipe.yml").write_text(text)
    weft.plan_run("recipe.yml")
    second = first.replace("odd", "absent")
    said = refused(root, text + second)
    assert "absent" in said
    assert "odd" not in said


@pytest.mark.parametrize("why", ["size", "architecture"])
def test_a_model_that_is_not_there_hides_no_misfit_of_the_others(root: Path, why: str) -> None:
    config = {"architectures": ["MistralForCausalLM"]} if why == "architecture" else {}
    tensors = llama()
    if why == "size":
        tensors = {n: t[..., :32].contiguous() if t.dim() > 1 else t for n, t in tensors.items()}
    checkpoint(root / "odd", tensors, config)
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n"
    said = refused(root, text + "".join(f"  - model: {m}\n" for m in ("a", "absent", "odd")))
    assert "2 problems" in said
    assert "absent" in said
    assert "line 5" in said
    if why == "size":
        assert "a and odd do not fit each other: 4 tensors differ, such as " in said
        assert ": [40, 48] and [40, 32]" in said
    else:
        assert "a is a LlamaForCausalLM, and odd is a MistralForCausalLM" in said
    assert "line 6" in said


def test_an_adapter_whose_base_is_not_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what it is, which base it names, and how to write where that is."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    lora(root / "adapter", 1, rms=1e-3, base="./no/such/base")
    lora(root / "nameless", 1, rms=1e-3)
    message = refused(root, LINEAR.replace("model: b", "model: adapter"))
    config = root / "adapter/adapter_config.json"
    assert f"adapter is an adapter, and {config} names its base ./no/such/base: no such" in message
    assert f"(looked for at {root}/no/such/base)  @" in message
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


def test_layers_that_their_numbers_tell_apart(root: Path) -> None:
    checkpoint(root / "mixed", llama(1), {"first_k_dense_replace": 1})
    slice = "  - sources: [{model: mixed, layer_range: [0, 2]}]\n"
    message = refused(root, f"merge_method: passthrough\nslices:\n{slice}{slice}")
    assert "by its number (first_k_dense_replace = 1): layer 2 would become another" in message
    assert "@ slices[1], line 4, column 5" in message
    assert "keep every layer in its place" in message


def test_a_module_that_the_recipe_leaves_out(root: Path) -> None:
    tensors = llama(1)
    for layer in range(3):
        tensors[f"vision_tower.layers.{layer}.attn.weight"] = tensors["lm_head.weight"][:4].clone()
    checkpoint(root / "sees", tensors)
    text = "merge_method: passthrough\nmodules:\n  text_decoder: {models: [model: sees]}\n"
    message = refused(root, text)
    assert "says nothing of the module vision_tower of sees, whose 3 tensors" in message
    assert "@ modules, line 2, column 1" in message


@pytest.mark.parametrize("line", ["tokenizer_source: union", "tokenizer: {source: base}"])
def test_a_config_that_does_not_say_how_many_rows(line: str, root: Path) -> None:
    checkpoint(root / "old", llama(1), {"vocab_size": None})
    message = refused(root, f"{LINEAR.replace('model: b', 'model: old')}{line}\n")
    key = line.partition(":")[0]
    assert "the config.json of old says no vocab_size, so its tokens have no rows" in message
    assert f"@ {key}, line 4, column 1" in message
    assert f"leave `{key}` out of the recipe" in message


@pytest.mark.parametrize(
    ("method", "parameter"), [("linear", "normalize"), ("multislerp", "normalize_weights")]
)
def test_weights_that_add_up_to_nothing(method: str, parameter: str, root: Path) -> None:
    """What is advised works."""
    text = f"merge_method: {method}\nmodels:\n  - {{model: a, parameters: {{weight: 0.5}}}}\n"
    text += "  - {model: b, parameters: {weight: -0.5}}\n"
    message = refused(root, text)
    assert "the weights 0.5, -0.5 add up to 0" in message
    assert "@ models, line 2, column 1" in message
    assert f"parameters:\n        {parameter}: false" in message
    run(root, f"{text}parameters:\n  {parameter}: false\n")


def test_ranks_that_leave_what_is_a_probability(root: Path) -> None:
    """A gradient does so in one layer: only the plan can tell."""
    text = TIES.replace("ties", "della") + "parameters: {weight: 1, density: [0.5, 0.9]}\n"
    message = refused(root, text)
    assert "density 0.9 with epsilon 0.15" in message
    assert "write an epsilon below 0.1, such as" in message
    run(root, text.replace("density", "epsilon: 0.05, density"))


@pytest.mark.parametrize(
    ("method", "above", "same"),
    [
        ("sce", "select_topk: 2", "select_topk: 1"),
        ("della", "weight: 1, epsilon: 0.6", "weight: 1"),
    ],
)
def test_more_than_all_is_all(method: str, above: str, same: str, root: Path) -> None:
    """As in MergeKit: sce selects below 1 only, and della drops below a density of 1 only."""
    text = TIES.replace("ties", method)
    found = run(root, f"{text}parameters: {{{above}}}\n", "above")
    expected = run(root, f"{text}parameters: {{{same}}}\n", "same")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_dtypes_are_advised_as_a_recipe_has_them(root: Path) -> None:
    """`--dtype` is an option of other commands."""
    text = "merge_method: passthrough\nmodels: [model: a]\nout_dtype: float16\n"
    with pytest.raises(NumericsError, match="overflows float16") as error:
        run(root, f"{text}parameters: {{scale: 1.0e+8}}\n")
    assert "`out_dtype: bfloat16` in the recipe" in str(error.value.hint)
    text = TIES.replace("ties", "task_arithmetic") + "parameters: {weight: 1.0e-3}\n"
    (root / "recipe.yml").write_text(text)
    (warning,) = weft.run("recipe.yml", output="out").warnings
    assert "`out_dtype: float32` in the recipe keeps all of it" in warning
    assert "--dtype" not in warning
    (root / "recipe.yml").write_text(f"{text}out_dtype: float32\n")
    assert weft.run("recipe.yml", output="wide").warnings == ()


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


def test_a_base_that_an_adapter_names_and_that_is_not_there(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command says which file names it, where it was looked for, and what overrides it."""
    lora(root / "adapter", 1, rms=1e-3, base="../base")
    fact = f"adapter is an adapter, and {root}/adapter/adapter_config.json names its base ../base: "
    fact += f"no such file or folder: ../base (looked for at {root.parent}/base)\n"
    cure = "hint: give the base first: weft merge BASE ADAPTER -o OUT\n"
    assert said_by(["merge", "adapter", "-o", "out"], capsys) == f"error: {fact}{cure}"
    cure = "hint: write where its base is: path/of/the/base+adapter\n"
    for command in (
        ["extract", "adapter", "--base", "base", "-o", "out"],
        ["diff", "adapter", "a"],
    ):
        assert said_by(command, capsys) == f"error: {fact}{cure}"


def test_a_model_that_lies_beside_the_recipe(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths count from the working folder, as in MergeKit: from another one the way is told."""
    (root / "recipe.yml").write_text(LINEAR.replace("model: b", "model: ./a+absent"))
    (root / "elsewhere").mkdir()
    monkeypatch.chdir(root / "elsewhere")
    with pytest.raises(WeftError) as error:
        weft.plan_run("../recipe.yml")
    where = f"no such file or folder: a (looked for at {root}/elsewhere/a)  @ models[0], line 2"
    assert where in str(error.value)
    beside = f"it exists beside the recipe: run from {root}, or write {root}/a\n"
    assert beside in str(error.value)
    monkeypatch.chdir(root)
    with pytest.raises(WeftError) as error:
        weft.plan_run("recipe.yml")
    assert f"no such file or folder: absent (looked for at {root}/absent)" in str(error.value)
    assert "beside the recipe" not in str(error.value)


def test_a_recipe_is_no_model(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "recipe.yml").write_text(LINEAR)
    (root / "extraction.yaml").write_text("base_model: base\nfinetune: a\n")
    for name in ("recipe.yml", "extraction.yaml"):
        said = said_by(["inspect", name], capsys)
        assert said.startswith(f"error: {root}/{name} is a recipe, and no model\nhint: weft run ")
        assert f"weft run {root}/{name} --check says whether it is sound, --dry-run" in said
    (root / "notes.yml").write_text("merge_methods: none\n")
    assert "is not weights" in said_by(["inspect", "notes.yml"], capsys)


# ---------------------------------------------------------------------------------------- notes


def noted(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a command that ends well says in notes, on either stream."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    both = capsys.readouterr()
    return [line for line in f"{both.err}{both.out}".splitlines() if line.startswith("note: ")]


DENSE = f"{TIES}parameters: {{weight: 1, density: 2}}\n"
BEYOND = "merge_method: slerp\nbase_model: base\nmodels: [model: a]\nparameters: {{t: {}}}\n"


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (DENSE, "note: a density of 2 keeps all of a: it is a share, up to 1"),
        (
            BEYOND.format("-1"),
            "note: a t of -1 goes beyond the two models, the base at 0 and the",
        ),
        (BEYOND.format("[0, 1.5]"), "note: a t of 1.5 goes beyond the two models"),
        (BEYOND.format("[{filter: q_proj, value: 2}, {value: 1}]"), "note: a t of 2 goes beyond"),
        (BEYOND.format("[0, 1]"), None),
        ("finetune: ./a\nbase_model: ./base\nrank: 4\n", None),
    ],
)
def test_the_same_notes_before_the_run_and_in_it(
    text: str, note: str | None, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "recipe.yml").write_text(text)
    ways = [["--check"], ["--dry-run"], ["-o", "out"]]
    check, dry_run, run = (noted(["run", "recipe.yml", *way], capsys) for way in ways)
    assert check == dry_run == run
    assert any(line.startswith(note) for line in run) if note else not any("t of" in n for n in run)
    with pytest.raises(SystemExit):
        main(["run", "recipe.yml", "--check", "--quiet"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["run", "merge", "extract"])
def test_nothing_to_resume(command: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora(root / "adapter", 1, rms=1e-3)
    (root / "recipe.yml").write_text(LINEAR)
    more = {"run": ["recipe.yml"], "merge": ["base", "adapter"], "extract": ["a", "--base", "base"]}
    start = [command, *more[command]]
    note = f"note: nothing to resume in {root}/out.partial: this run starts from the beginning"
    assert noted([*start, "-o", "out", "--resume"], capsys).count(note) == 1
    assert not any("resume" in line for line in noted([*start, "-o", "other"], capsys))
    with pytest.raises(SystemExit):
        main([*start, "-o", "out", "--resume"])
    said = capsys.readouterr().err
    assert re.search("exists.*, so there is nothing to resume", said)


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LINEAR, "7 of 7 tensors merged"),
        (f"{TIES}parameters: {{weight: 1}}\n", "7 of 7 tensors changed"),
        (f"{TIES}parameters: {{weight: 1, lambda: 0}}\n", "0 of 7 tensors changed"),
        ("merge_method: passthrough\nmodels: [model: a]\n", "7 of 7 tensors copied"),
        ("merge_method: passthrough\nmodels: [model: base+adapter]\n", "2 of 7 tensors changed"),
        (
            SCALED,
            "2 of 7 tensors merged",
        ),
        (
            "modules:\n  model: {models: [model: a]}\nmerge_method: passthrough\n",
            "7 of 7 tensors copied",
        ),
    ],
)
def test_what_became_of_the_tensors(
    text: str, said: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what a method without a base makes nobody knows whether it changed, and from what."""
    lora(root / "adapter", 1, rms=1e-2)
    (root / "recipe.yml").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["run", "recipe.yml", "-o", "out"])
    assert not end.value.code
    assert capsys.readouterr().out.startswith(f"{said}, ")
    assert f"\n{said}, " in (root / "out/README.md").read_text()


def test_filters_that_match_nothing(root: Path) -> None:
    """MergeKit takes them without a word."""
    text = f"{TIES}parameters:\n  weight: [{{filter: self_atn, value: 1}}, {{value: 2}}]\n"
    (root / "recipe.yml").write_text(text)
    (warning,) = weft.plan_run("recipe.yml").warnings
    assert "the filter 'self_atn' of weight matches no tensor, and so does nothing" in warning
    assert "did you mean 'self_attn'?" in warning
    line = text[: text.index("self_atn")].count("\n") + 1
    assert f"@ parameters.weight, line {line}, column " in warning


# ------------------------------------------------------------------------------ NaN and infinity

SETTINGS = {
    "slerp": "t: 0.3",
    "nearswap": "t: 0.01",
    "sce": "select_topk: 0.5",
    "linear": "weight: 1",
    "nuslerp": "weight: 1",
    "multislerp": "weight: 1",
    "passthrough": "scale: 0.5",
    **dict.fromkeys(("ties", "breadcrumbs", "breadcrumbs_ties"), "weight: 1, density: 0.5"),
    **dict.fromkeys(("dare_ties", "dare_linear", "della"), "weight: 1, density: 0.5"),
    **dict.fromkeys(("della_linear", "task_arithmetic"), "weight: 1, density: 0.5"),
}


def recipe_of(method: str) -> str:
    own = methods.method(method)
    most = own.INPUTS[1] or 2
    names = ["a", "b"][:most]
    base = "base_model: base\n" if own.BASE != "none" else ""
    models = ", ".join(f"model: {name}" for name in names)
    parameters = SETTINGS.get(method, "")
    return f"merge_method: {method}\n{base}models: [{models}]\nparameters: {{{parameters}}}\n"


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("method", methods.names())
def test_the_file_that_holds_nan_is_named(method: str, value: str, root: Path) -> None:
    """In the last of several models, or in the base, whatever the method does with it."""
    text = recipe_of(method)
    name = f"{MATRIX.format(1)}.weight"
    asked = re.findall(r"model: (\w+)", text)
    for model in dict.fromkeys((asked[0], asked[-1])):
        tensors = llama({"base": None, "a": 1, "b": 2}[model])
        tensors[name][3, 5] = float(value)
        sound = (root / model / "model.safetensors").read_bytes()
        save_file(tensors, root / model / "model.safetensors", {"format": "pt"})
        with pytest.raises(NumericsError) as error:
            run(root, text)
        assert str(error.value).startswith(f"{name} in {root}/{model}/model.safetensors holds NaN")
        assert not (root / "out").exists()
        (root / model / "model.safetensors").write_bytes(sound)


def test_nan_of_what_is_only_cast_is_warned_of(root: Path) -> None:
    """A mask may hold infinity. What is not even cast the kernel copies, and nobody looks at it."""
    tensors = llama(1)
    tensors["lm_head.weight"][0, 0] = float("nan")
    tensors["model.norm.weight"][0] = float("-inf")
    save_file(tensors, root / "a/model.safetensors", {"format": "pt"})
    (root / "recipe.yml").write_text("merge_method: passthrough\nmodels: [model: a]\n")
    copied = weft.run("recipe.yml", output="copied")
    assert not any("NaN" in warning for warning in copied.warnings)
    with (root / "recipe.yml").open("a") as file:
        file.write("dtype: float32\n")
    found = weft.run("recipe.yml", output="cast")
    assert found.warnings == (
        "NaN or infinity in lm_head.weight and 1 more, taken over as they were",
    )
    assert found.manifest["warnings"] == list(found.warnings)
    assert load(root / "cast")["lm_head.weight"][0, 0].isnan()


def test_a_large_change_without_adapters(root: Path) -> None:
    """What is there to check is said, and not what only adapters have."""
    text = TIES.replace("ties", "task_arithmetic") + "parameters: {weight: 100}\n"
    (root / "recipe.yml").write_text(text)
    report = weft.run("recipe.yml", output=root / "out")
    (warning,) = (line for line in report.warnings if line.startswith("‖ΔW‖ is "))
    assert "lora_alpha" not in warning
    assert "check the weights" in warning


@pytest.mark.parametrize("value", ["1.0e+300", "-1.0e+39"])
@pytest.mark.parametrize("method", ["ties", "linear", "della"])
def test_a_weight_beyond_float32(root: Path, method: str, value: str) -> None:
    base = "" if method == "linear" else "base_model: base\n"
    text = f"merge_method: {method}\n{base}models: [model: a, model: b]\n"
    said = refused(root, f"{text}parameters: {{weight: {value}}}\n")
    assert '"weight" should be a number that float32 knows' in said


def test_a_weight_of_an_adapter_beyond_float32(root: Path) -> None:
    lora(root / "adapter", 1, rms=1e-3)
    with pytest.raises(WeftError, match=r"the update of .* is NaN or infinite") as error:
        weft.merge(root / "base", f"{root / 'adapter'}:1e300", output=root / "out")
    assert "weight that it is given" in (error.value.hint or "")
