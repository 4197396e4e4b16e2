"""Models that do not fit each other: which of them is said to be the odd one out, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import running
from running import VOCABULARY, checkpoint, llama, lora

import weft
from weft.core.errors import PlanError

WIDE = 64
VOCABULARIES = "the models have different vocabularies"
ONE_SIZE = "only models of one architecture and size can be merged"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, `a` and `b` fit each other; `wide`, `deep`, `other` and `more` fit none of them."""
    for number, name in enumerate(("base", "a", "b")):
        checkpoint(tmp_path / name, llama(number or None))
    checkpoint(tmp_path / "deep", llama(3, layers=3))
    checkpoint(tmp_path / "other", llama(4), {"architectures": ["MistralForCausalLM"]})
    with monkeypatch.context() as patch:
        patch.setattr(running, "HIDDEN", WIDE)
        checkpoint(tmp_path / "wide", llama(5), {"hidden_size": WIDE})
    with monkeypatch.context() as patch:
        patch.setattr(running, "VOCABULARY", VOCABULARY + 4)
        checkpoint(tmp_path / "more", llama(6), {"vocab_size": VOCABULARY + 4})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(text: str) -> list[str]:
    """The problems of a recipe, each with its hint."""
    Path("recipe.yml").write_text(text)
    with pytest.raises(PlanError) as error:
        weft.plan_run("recipe.yml")
    count, *found = str(error.value).split("\n  - ")
    assert count == f"{len(found)} problem{'s' if len(found) > 1 else ''} in recipe.yml"
    return found


def of(*models: str, base: str | None = None, more: str = "") -> list[str]:
    """The problems of a merge of these, the first of which is in line 4."""
    method = "task_arithmetic" if base else "linear"
    listed = "".join(f"  - model: {model}\n" for model in models)
    above = f"base_model: {base}\n" if base else "dtype: float32\n"
    return said(
        f"merge_method: {method}\n{above}models:\n{listed}parameters: {{weight: 1}}\n{more}"
    )


# ------------------------------------------------------------------------------ who is to blame


@pytest.mark.parametrize("at", range(3))
def test_the_odd_one_out_is_blamed_wherever_it_stands(root: Path, at: int) -> None:
    models = ["a", "b"]
    models.insert(at, "wide")
    (problem,) = of(*models)
    assert problem.startswith("wide does not fit a and b: hidden_size 64 in place of 48; ")
    assert f"@ models[{at}], line {4 + at}, column 5" in problem
    models[at] = "deep"
    (problem,) = of(*models)
    assert problem.startswith(
        "deep does not fit a and b: 3 in place of 2 layers in model.layers  @"
    )
    models[at] = "other"
    (problem,) = of(*models)
    assert problem.startswith(
        "other is a MistralForCausalLM, and a and b are each a LlamaForCausalLM  @ "
    )
    assert "model: {path: other}\n        override_architecture: LlamaForCausalLM" in problem


@pytest.mark.parametrize(
    ("odd", "fact"),
    [
        ("wide", "do not fit each other: hidden_size 48 and 64; "),
        ("deep", "do not fit each other: 2 and 3 layers in model.layers"),
        ("more", "do not fit each other: vocab_size 40 and 44; "),
    ],
)
def test_of_two_none_is_right(root: Path, odd: str, fact: str) -> None:
    (problem,) = of("a", odd)
    assert problem.startswith(f"a and {odd} {fact}")
    assert "in place of" not in problem


def test_of_two_architectures_none_is_right(root: Path) -> None:
    (problem,) = of("a", "other")
    assert problem.startswith(
        "a is a LlamaForCausalLM, and other is a MistralForCausalLM  @ models[1]"
    )


def test_the_base_is_right_unless_most_are_otherwise(root: Path) -> None:
    (problem,) = of("wide", base="base")
    assert problem.startswith("wide does not fit the base base: hidden_size 64 in place of 48; ")
    (problem,) = of("a", base="wide")
    assert problem.startswith("a does not fit the base wide: hidden_size 48 in place of 64; ")
    assert "@ models[0], line 4" in problem
    (problem,) = of("a", "b", base="wide")
    assert problem.startswith("wide does not fit a and b: hidden_size 64 in place of 48; ")
    assert "@ base_model, line 2" in problem


def test_a_model_that_is_blamed_has_no_say_in_what_else_differs(root: Path) -> None:
    first, second = of("a", "more", "wide")
    assert first.startswith("a and more do not fit each other: vocab_size 40 and 44; 2 tensors ")
    assert VOCABULARIES in first
    assert second.startswith("wide does not fit a and more: hidden_size 64 in place of 48; ")
    assert ONE_SIZE in second


def test_all_kinds_of_misfits_at_once(root: Path) -> None:
    """In the order of the lines, and one for each model, also beside one that is not there."""
    found = of("other", "wide", "./absent", "a", "deep", "b")
    begin = [problem.split(" ")[0] for problem in found]
    assert begin == ["other", "wide", "no", "deep"]
    assert [f"line {line}, " in problem for line, problem in zip((4, 5, 6, 8), found, strict=True)]


def test_another_depth_hides_no_other_misfit(root: Path) -> None:
    found = of("a", "deep", "more", "b", "wide")
    assert [problem.split(" ")[0] for problem in found] == ["deep", "more", "wide"]
    assert "vocab_size 44 in place of 40" in found[1]
    assert "hidden_size 64 in place of 48" in found[2]


def test_a_range_that_is_too_long_is_said_beside_a_missing_model(root: Path) -> None:
    found = said(
        "merge_method: linear\nslices:\n  - sources:\n    - {model: a, layer_range: [0, 7]}\n"
        "    - {model: ./absent, layer_range: [0, 7]}\nparameters: {weight: 1}\n"
    )
    assert len(found) == 2
    assert "reaches past the 2 layers of a  @ slices[0].sources[0].layer_range" in found[0]
    assert "absent" in found[1]


# ------------------------------------------------------------------------------ what is the cause


def test_another_size_is_no_other_vocabulary(root: Path) -> None:
    """One problem, which counts the tensors and shows one."""
    (problem,) = of("a", "b", "wide")
    assert "; 7 tensors differ, such as lm_head.weight: [40, 64] in place of [40, 48]  @" in problem
    assert ONE_SIZE in problem
    assert VOCABULARIES not in problem


def test_another_vocabulary_is_one_problem(root: Path) -> None:
    (problem,) = of("a", "b", "more")
    assert problem.startswith("more does not fit a and b: vocab_size 44 in place of 40; 2 tensors ")
    assert VOCABULARIES in problem


def test_layers_of_another_width_are_not_stacked(root: Path) -> None:
    """Every slice alone is sound."""
    (problem,) = said(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 1]}]\n"
        "  - sources: [{model: wide, layer_range: [0, 1]}]\n"
    )
    assert problem.startswith(
        "a and wide do not fit each other: hidden_size 48 and 64  @ slices[1]"
    )


# -------------------------------------------------------------- the file and its models at once


def test_mistakes_of_the_file_and_of_its_models_at_once(root: Path) -> None:
    lora(root / "adapter", 1, rms=1e-3)
    found = said(
        "merge_method: ties\n"
        "base_model: ./absent\n"
        "dtyp: float16\n"
        "models:\n"
        "  - {model: a, parameters: {weight: 1, densty: 1}}\n"
        "  - {model: b+./adaptor, parameters: {weight: 1}}\n"
        "  - {model: a+, parameters: {weight: 1}}\n"
        "  - {model: adapter, parameters: {weight: 1}}\n"
        "parameters: {normlize: true}\n"
    )
    starts = {
        2: "no such file or folder: ./absent",
        3: 'unknown key "dtyp"',
        5: 'unknown parameter "densty"',
        6: "no such file or folder: ./adaptor",
        7: '"a+" lacks a path',
        8: "adapter is an adapter, and does not say of which base",
        9: 'unknown parameter "normlize"',
    }
    assert len(found) == len(starts)
    for (line, start), problem in zip(starts.items(), found, strict=True):
        assert problem.startswith(start)
        assert f"line {line}, column" in problem


def test_documents_of_a_faulty_file_are_no_models_that_are_missing(root: Path) -> None:
    """Whether they could be read, or not."""
    good = (
        "name: good\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [model: a, model: b]\n"
    )
    bad = "name: bad\nmerge_method: linear\nmodels: 7\n"
    last = "merge_method: linear\nparameters: {wight: 1}\nmodels: [model: good, model: bad]\n"
    found = said(f"{good}---\n{bad}---\n{last}")
    assert not any("no such file" in problem for problem in found)
    assert len(found) == 2


def test_models_of_a_file_that_is_hardly_understood(root: Path) -> None:
    """Without a method, or without a model; and of an extraction recipe."""
    found = said("base_model: ./absent\nmodels:\n  - model: a\n  - model: b+./none\n  - {}\n")
    assert [problem.split(",")[0] for problem in found] == [
        '"merge_method" is missing  @ line 1',
        f"no such file or folder: ./absent (looked for at {root}/absent)  @ base_model",
        f"no such file or folder: ./none (looked for at {root}/none)  @ models[1].model",
        '"model" is missing  @ models[2]',
    ]
    found = said("finetune: ./absent\nbase_model: ./none\nrnk: 8\n")
    assert "no such file or folder: ./absent" in found[0]
    assert "@ finetune, line 1, column 1" in found[0]
    assert "@ base_model, line 2, column 1" in found[1]
    assert found[2].startswith('unknown key "rnk"')


def test_a_mistake_made_twice_is_shown_with_all_its_places(root: Path) -> None:
    text = "merge_method: ties\nbase_model: base\nmodels:\n"
    text += "  - {model: a, parameters: {weight: 1, densty: 1}}\n"
    text += "  - model: b\n    parameters: {weight: 1, densty: 1}\n"
    (root / "recipe.yml").write_text(text)
    with pytest.raises(PlanError) as error:
        weft.plan_run("recipe.yml")
    at = "@ models[0].parameters, line 4, column 40 (and 1 more: line 6, column 29)"
    assert at in str(error.value)


def test_the_cause_is_not_taken_from_a_model_that_is_odd_in_it(root: Path) -> None:
    found = of("more", "a", "b", "deep")
    (deep,) = (each for each in found if each.startswith("deep does not fit"))
    assert "3 in place of 2 layers" in deep
    assert "vocab" not in deep


def test_a_config_that_lies_about_a_width_is_no_misfit(root: Path) -> None:
    checkpoint(root / "liar", llama(7), {"hidden_size": WIDE})
    listed = "".join(f"  - model: {model}\n" for model in ("a", "b", "liar"))
    text = f"merge_method: linear\ndtype: float32\nmodels:\n{listed}parameters: {{weight: 1}}\n"
    Path("recipe.yml").write_text(text)
    assert len(weft.plan_run("recipe.yml").plan.jobs) == len(llama())


# ------------------------------------------------------------------- beside mistakes of the file


def test_misfits_are_told_with_the_mistakes_of_the_file(root: Path) -> None:
    found = of("base", "wide", "a", "nix", more="dtyp: float32\n")
    assert len(found) == 3
    assert any(
        "wide does not fit" in each and "hidden_size 64 in place of 48" in each for each in found
    )
    assert any("no such file or folder: nix" in each for each in found)
    assert any("dtyp" in each for each in found)


def test_layers_that_a_faulty_file_chooses_are_not_compared(root: Path) -> None:
    """What it meant by them nobody knows yet."""
    slices = "".join(
        f"  - sources: [{{model: {model}, layer_range: [0, 2]}}]\n" for model in ("base", "deep")
    )
    found = said(f"merge_method: passthrough\nslices:\n{slices}dtyp: float32\n")
    assert len(found) == 1
    assert "dtyp" in found[0]
