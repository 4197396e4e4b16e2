"""What is said of a recipe that cannot be meant: the fact, the place, and what to write."""

from __future__ import annotations

import textwrap

import pytest

from tests.recipes import json_schema
from weft.core.errors import FormatError, PlanError, RecipeError, Unsupported, WeftError
from weft.recipes import schema
from weft.recipes.mergekit import read

pytestmark = pytest.mark.usefixtures("mergekit_methods")

TWO = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
ONE = "merge_method: passthrough\nmodels: [{model: "
LINEAR = "merge_method: linear\n" + TWO


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(textwrap.dedent(text), "merge.yml")
    message = str(caught.value)
    count = len(caught.value.problems)
    assert message.startswith(f"{count} problem{'s' if count > 1 else ''} in merge.yml\n")
    assert isinstance(caught.value, PlanError)
    assert all("  @ " in problem.what for problem in caught.value.problems)
    return message


def test_the_form_of_a_message() -> None:
    assert (
        refused("""\
            merge_method: linear
            models:
              - model: org/a
                parameters: {weight: 1}
              - model: org/b
                parameters:
                  wieght: 0.5
              - model: org/c
            """)
        == """\
2 problems in merge.yml
  - unknown parameter "wieght", did you mean "weight"?  @ models[1].parameters, line 7, column 7
      linear has: weight, normalize
  - org/c has no "weight", and linear needs one of every model  @ models[2], line 8, column 5
      write under it:
      parameters:
        weight: 0.5"""
    )


def test_alike_problems_show_once() -> None:
    models = "".join(f"  - {{model: m{i}, paramters: {{weight: 1}}}}\n" for i in range(30))
    message = refused("merge_method: linear\nmodels:\n" + models)
    assert message.startswith("30 problems")
    assert message.count("\n") == 1
    assert "@ models[0], line 3, column 17 (and 29 more: line 4, column 17; line 5, " in message
    assert message.endswith("; line 11, column 17; …)")


MISTAKES = {
    # what is wrong -> (the recipe, all of which must be said)
    "unknown method": (
        "merge_method: dare-ties\nbase_model: c\n" + TWO,
        ['unknown merge_method "dare-ties", did you mean "dare_ties"?  @ merge_method, line 1'],
    ),
    "no method": (TWO, ['"merge_method" is missing  @ line 1', "merge_method: linear"]),
    "unknown key": (
        LINEAR + "base_modle: a\n",
        ['unknown key "base_modle", did you mean "base_model"?  @ line 3, column 1'],
    ),
    "no key like it": (LINEAR + "xyzzy: 1\n", ['unknown key "xyzzy"', "known here: name, merge_"]),
    "an option": (LINEAR + "random_seed: 1\n", ['"random_seed" is an option of the command line']),
    "a parameter among the keys": (
        LINEAR + "normalize: true\n",
        ['"normalize" is a parameter  @ line 3', "parameters:\n        normalize: true"],
    ),
    "a parameter beside the model": (
        "merge_method: linear\nmodels: [{model: a, weight: 0.5}]\n",
        ['"weight" is a parameter  @ models[0], line 2', "weight: 0.5"],
    ),
    "layers of a whole model": (
        "merge_method: passthrough\nmodels: [{model: a, layer_range: [0, 8]}]\n",
        ['"layer_range" belongs to the sources of a slice', "layer_range: [0, 8]"],
    ),
    "models by name alone": (
        "merge_method: linear\nmodels: [org/a, org/b]\nparameters: {weight: 1}\n",
        ['should be a mapping, not "org/a"  @ models[0]', "- model: org/b"],
    ),
    "parameters in a list": (
        "merge_method: linear\nmodels: [{model: a, parameters: [{weight: 1}]}]\n",
        ['"parameters" should be a mapping, with a key on each line'],
    ),
    "a value among entries": (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [2, {value: 1}]}\n",
        ["an entry of `weight` should be a mapping", "- value: 2"],
    ),
    "a path without a model": (
        "merge_method: passthrough\nmodels: [{model: {model: {path: a}, revision: b}}]\n",
        ['unknown key "revision"', "model: {path: ./folder}"],
    ),
    "a slice without sources": (
        (
            "merge_method: passthrough\nslices:\n"
            "- {model: a, sources: [{model: a, layer_range: [0, 1]}]}\n"
        ),
        ['unknown key "model"  @ slices[0]', "sources:\n        - model: org/name"],
    ),
    "no number": (
        "merge_method: linear\nparameters: {weight: much}\n" + "models: [{model: a}]\n",
        ['"weight" should be a number, not "much"  @ parameters.weight, line 2', "weight: 0.5"],
    ),
    "a number that is none": (
        "merge_method: linear\nparameters: {weight: .nan}\nmodels: [{model: a}]\n",
        ['"weight" should be a number, not nan'],
    ),
    "no whole number": (
        "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: 1.5}\n",
        ['"max_iter" should be a whole number, not 1.5'],
    ),
    "no truth": (
        LINEAR + "parameters: {normalize: maybe}\n",
        ['"normalize" should be true or false, not "maybe"  @ parameters.normalize, line 3'],
    ),
    "nothing said": (
        LINEAR + "parameters: {normalize: }\n",
        ['"normalize" says nothing: write a value, or leave the key out'],
    ),
    "a gradient with a hole": (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [1, null, 2, null]}\n",
        ["an entry of `weight` should be a number"],
    ),
    "a filter without a value": (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [{filter: mlp}]}\n",
        ['"value" is missing  @ parameters.weight[0]', "- filter: mlp"],
    ),
    "a misspelt filter": (
        (
            "merge_method: linear\nmodels: [{model: a}]\n"
            "parameters: {weight: [{filters: mlp, value: 1}]}\n"
        ),
        ['unknown key "filters", did you mean "filter"?  @ parameters.weight[0], line 3'],
    ),
    "a shared parameter under a model": (
        (
            "merge_method: slerp\nbase_model: a\n"
            "models: [{model: a}, {model: b, parameters: {t: 0.5}}]\n"
        ),
        [
            '"t" is one for all models in slerp, and would not be read under a model',
            "@ models[1].parameters, line 3",
            "parameters:\n        t: 0.5",
        ],
    ),
    "a shared parameter missing": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n",
        ['slerp needs "t"', "parameters:\n        t: 0.5"],
    ),
    "a list of no weights": (
        (
            "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
            "  - model: b\n    parameters: {weight: []}\n"
        ),
        [
            'b has no "weight", and linear needs one of every model: the list under it is empty',
            "@ models[1], line 4",
            "write under the `parameters` of b:\n        weight: 0.5",
        ],
    ),
    "parameters in parameters": (
        (
            "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
            "  - model: b\n    parameters:\n      parameters: {weight: 1}\n"
        ),
        [
            '"parameters" stands within `parameters`  @ models[1].parameters, line 6, column 7',
            "parameters:\n        weight: 1",
        ],
    ),
    "one model, no weight": (
        "merge_method: linear\nmodels: [{model: org/a}]\n",
        ['org/a has no "weight"', "`merge_method: passthrough`"],
    ),
    "a weight only for the models": (
        LINEAR + "base_model: c\n",
        ['c has no "weight"', "@ base_model, line 3", "leave `base_model` out"],
    ),
    "no base": (
        "merge_method: ties\n" + TWO,
        ["ties needs a base_model", "base_model: path/or/id"],
    ),
    "two models and no base": (
        "merge_method: slerp\nparameters: {t: 0.5}\n" + TWO,
        ["slerp needs a base_model"],
    ),
    "a base that is no source": (
        (
            "merge_method: ties\nbase_model: c\nparameters: {weight: 1}\n"
            "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]\n"
        ),
        [
            "the base c is not among the sources of the slice",
            "@ slices[0], line 4",
            "- model: c\n        layer_range: [0, 2]",
        ],
    ),
    "too many models": (
        (
            "merge_method: slerp\nbase_model: a\nparameters: {t: 1}\n"
            "models: [{model: a}, {model: b}, {model: c}]\n"
        ),
        ["slerp takes exactly 1 model beside the base, and there are 2", "of 2 models: "],
    ),
    "too few models": (
        "merge_method: model_stock\nbase_model: a\nmodels: [{model: a}, {model: b}]\n",
        ["model_stock takes 2 or more models beside the base, and there is 1"],
    ),
    "two models passed through": (
        "merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n",
        ["passthrough takes exactly 1 model, and there are 2  @ models, line 2"],
    ),
    "a model twice": (
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: a/}]\n",
        ["a stands twice in what is merged into one tensor  @ models[1], line 3"],
    ),
    "slices of unequal length": (
        (
            "merge_method: linear\nparameters: {weight: 1}\nslices:\n  - sources:\n"
            "    - {model: a, layer_range: [0, 8]}\n    - {model: b, layer_range: [0, 7]}\n"
        ),
        ["7 layers of b, but 8 of a in the same slice", "sources[1].layer_range, line 6"],
    ),
    "layers backwards": (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [8, 0]}]}]\n",
        ["layers 8 to 0 go backwards", "layer_range: [0, 8]"],
    ),
    **{
        f"layers as {layers}": (
            (
                "merge_method: passthrough\n"
                f"slices: [{{sources: [{{model: a, layer_range: {layers}}}]}}]\n"
            ),
            [
                '"layer_range" should be two whole numbers, the first layer and the one after',
                "@ slices[0].sources[0].layer_range, line 2",
                cure,
            ],
        )
        for layers, cure in {
            "8": "layer_range: [0, 8]",
            "4-8": "layer_range: [4, 8]",
            "[8]": "layer_range: [0, 8]",
            "[0, 4, 8]": "layer_range: [0, 32]",
            "[0, last]": "layer_range: [0, 32]",
            "[0, 1.5]": "layer_range: [0, 32]",
        }.items()
    },
    "layers from the end": (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, -1]}]}]\n",
        ["layer -1 is none: layers are counted from 0 on", "write their number for the end"],
    ),
    "no layers": (
        "merge_method: passthrough\nslices: [{sources: [{model: a}]}]\n",
        ['"layer_range" is missing  @ slices[0].sources[0]'],
    ),
    "no sources": ("merge_method: passthrough\nslices: [{sources: []}]\n", ["is an empty list"]),
    "both models and slices": (
        LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
        ['"models" and "slices" in one recipe'],
    ),
    "neither": ("merge_method: linear\n", ["nothing to merge", "- model: org/name"]),
    "neither in a module": (
        "merge_method: linear\nmodules: {text: {}}\n",
        ['module "text" has neither of "models" and "slices"  @ modules, line 2'],
    ),
    "a share below none": (
        (
            "merge_method: ties\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
            "parameters: {weight: 1, density: [0.5, -1]}\n"
        ),
        ['"density" should be 0 or more, not -1  @ parameters.density[1], line 4', "density: 1"],
    ),
    "outliers of more than all": (
        (
            "merge_method: breadcrumbs\nbase_model: a\n"
            "models: [{model: b, parameters: {weight: 1, gamma: 1.5}}]\n"
        ),
        [
            '"gamma" should be from 0 to 1, not 1.5  @ models[0].parameters.gamma, line 3',
            "such as gamma: 0.01",
        ],
    ),
    "a selection below none": (
        (
            "merge_method: sce\nbase_model: a\nmodels: [{model: b}]\n"
            "parameters:\n  select_topk: [{filter: mlp, value: [0.5, -2]}, {value: 1}]\n"
        ),
        [
            '"select_topk" should be 0 or more, not -2',
            "@ parameters.select_topk[0].value[1], line 5",
        ],
    ),
    "a step back": (
        "merge_method: nearswap\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: -0.1}\n",
        ['"t" should be 0 or more, not -0.1  @ parameters.t, line 4', "such as t: 0.001"],
    ),
    "iterations below none": (
        "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: -1}\n",
        ['"max_iter" should be 0 or more, not -1  @ parameters.max_iter', "max_iter: 10"],
    ),
    "a tolerance below none": (
        "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {tol: -1.0e-5}\n",
        ['"tol" should be 0 or more, not -1e-05  @ parameters.tol', "tol: 1e-05"],
    ),
    "an epsilon below none": (
        (
            "merge_method: della\nbase_model: a\n"
            "models: [{model: b, parameters: {weight: 1, density: 0.5, epsilon: -0.1}}]\n"
        ),
        ['"epsilon" should be 0 or more, not -0.1  @ models[0].parameters.epsilon, line 3'],
    ),
    "epsilon too wide": (
        (
            "merge_method: della\nbase_model: a\n"
            "models: [{model: b, parameters: {weight: 1, density: 0.9}}]\n"
        ),
        ["density 0.9 ± epsilon 0.15 of b", "an epsilon below 0.1"],
    ),
    "epsilon wider than a half": (
        (
            "merge_method: della\nbase_model: a\n"
            "models: [{model: b, parameters: {weight: 1, density: 0.5, epsilon: 0.6}}]\n"
        ),
        ["density 0.5 ± epsilon 0.6 of b", "an epsilon below 0.5"],
    ),
    "unknown dtype": (LINEAR + "dtype: float8\n", ["unknown dtype", "one of float32, float16"]),
    **{
        f"a dtype of whole numbers: {name}": (
            LINEAR + f"{key}: {name}\n",
            [
                f"{key}: {name} would make whole numbers of the weights, and most of them 0",
                f"@ {key}, line 3, column 1",
                "one of float32, float16, bfloat16, float64",
            ],
        )
        for key, name in (("dtype", "int64"), ("out_dtype", "int8"), ("dtype", "torch.uint8"))
    },
    "unknown template": (
        LINEAR + "chat_template: chatlm\n",
        ['unknown chat_template "chatlm", did you mean "chatml"?  @ chat_template, line 3'],
    ),
    "a tokenizer in one word": (
        LINEAR + "tokenizer: base\n",
        ['"tokenizer" should be a mapping', "source: base"],
    ),
    "two tokenizers": (
        LINEAR + "tokenizer: {source: a}\ntokenizer_source: b\n",
        ['"tokenizer" and "tokenizer_source" in one recipe'],
    ),
    "a token from nowhere": (
        LINEAR + 'tokenizer: {tokens: {"<|x|>": {source: {kind: model_token, model: a}}}}\n',
        ["needs a model, and either token or token_id", '@ tokenizer.tokens["<|x|>"].source'],
    ),
    "a padding of none": (
        LINEAR + "tokenizer: {pad_to_multiple_of: 0}\n",
        ['"pad_to_multiple_of" should be greater than or equal to 1, not 0'],
    ),
    "two revisions": (
        "merge_method: passthrough\nmodels: [{model: a@b@c}]\n",
        ['"a@b@c" has more than one @', "@ models[0].model", "{path: 'a@b@c'}"],
    ),
    "an adapter without a path": (
        "merge_method: passthrough\nmodels: [{model: a+}]\n",
        ['"a+" lacks a path'],
    ),
    "a weight that is a word": (
        "merge_method: passthrough\nmodels: [{model: a+all:abc}]\n",
        [
            '"a+all:abc" gives all the weight "abc", which is no number  @ models[0].model, line 2',
            "write +all:0.5",
            "lora: {path: 'all:abc'}",
        ],
    ),
    "a weight that is none": (
        "merge_method: passthrough\nmodels: [{model: 'a+b:nan'}]\n",
        ['gives b the weight "nan", which is no number'],
    ),
    "a weight without an end": (
        "merge_method: passthrough\nmodels: [{model: 'a+b:1e999'}]\n",
        ['gives b the weight "1e999", which is no number'],
    ),
    "a weight written out that is none": (
        (
            "merge_method: passthrough\n"
            "models: [{model: {model: a, lora: {path: b, weight: .nan}}}]\n"
        ),
        ['"weight" should be a finite number, not nan  @ models[0].model.lora.weight, line 2'],
    ),
    "a revision without a name": (
        "merge_method: passthrough\nmodels: [{model: a@}]\n",
        ['"a@" lacks a revision after the @'],
    ),
    "a model that is a number": (
        "merge_method: passthrough\nmodels: [{model: 7}]\n",
        ['"model" should be text: put it in quotes, not 7  @ models[0].model'],
    ),
    "a key twice": (
        LINEAR + "dtype: float16\nmodels: []\n",
        ['"models" for a second time, after line 2', "line 4, column 1"],
    ),
    "a key that is a number": (LINEAR + "7: 8\n", ["the key 7 is no text"]),
    "a tag": (LINEAR + "dtype: !!binary aGk=\n", ["has no place in a recipe  @ dtype, line 3"]),
    "a merge of nothing": (LINEAR + "<<: 3\n", ["`<<` takes a mapping"]),
    "an extraction and a merge": (
        "merge_method: linear\nfinetune: a\nbase_model: b\n",
        [
            '"finetune" asks for an adapter, and "merge_method" for a merge of models  @ line 2',
            "for an adapter leave `merge_method` out",
        ],
    ),
    "a rank in a merge": (LINEAR + "rank: 16\n", ['"rank" asks for an adapter']),
    "no mapping": ("- merge_method: linear\n", ["a recipe is a mapping"]),
    "an unknown model of input_model_parameters": (
        LINEAR + "input_model_parameters: {c: {weight: 1}}\n",
        ['"c" is none of the models  @ input_model_parameters, line 3'],
    ),
    "two outputs": (LINEAR + "---\n" + LINEAR, ["a second document without a name"]),
    "two of a name": (
        f"name: x\n{LINEAR}---\nname: x\n{LINEAR}",
        ['a second document called "x"  @ name, line 5'],
    ),
    "a circle": (
        f"name: a\n{ONE}b}}]\n---\nname: b\n{ONE}a}}]\n",
        ["documents that are made from each other: a ← b ← a", "write ./a"],
    ),
    "made from itself": (
        f"name: a\n{LINEAR}",
        ["documents that are made from each other: a ← a"],
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_gets_an_answer(what: str) -> None:
    text, expected = MISTAKES[what]
    message = refused(text)
    for part in expected:
        assert part in message


# What one mistake must not lead to.
ALONE = sorted(
    set(MISTAKES)
    - {"models by name alone", "a gradient with a hole", "a number that is none"}
    - {"two of a name", "a tag", "made from itself"}
)


@pytest.mark.parametrize("what", ALONE)
def test_a_mistake_leads_to_no_others(what: str) -> None:
    assert refused(MISTAKES[what][0]).startswith("1 problem in")


def test_everything_is_said_at_once() -> None:
    message = refused("""\
        merge_method: ties
        base_modle: org/base
        models:
          - model: org/a
            parameters: {weight: 1, densty: 0.5, normalize: true}
          - modle: org/b
          - org/c
        dtype: bfloat17
        parameter: {t: 0.5}
        """)
    for part in (
        "base_modle",
        "densty",
        '"normalize" is one for all',
        '"modle"',
        "- model: org/c",
        'org/b has no "weight"',
        'org/c has no "weight"',
        "bfloat17",
        'unknown key "parameter"',
    ):
        assert part in message
    lines = [int(problem.split("line ")[1].split(",")[0]) for problem in message.split("  @ ")[1:]]
    assert lines == sorted(lines)


def test_mistakes_of_all_documents_are_said() -> None:
    message = refused(f"name: x\n{LINEAR}dtpe: float16\n---\n{LINEAR}otu_dtype: float16\n")
    assert "line 4, column 1" in message
    assert "line 8, column 1" in message


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("models: [\n", "line 2, column 1"),
        ("a: b: c\n", "line 1, column 5"),
        ("a:\n\t- b\n", "line 2, column 1"),
        ("a: *nothing\n", "line 1, column 4"),
        ('a: "\n', "line 2, column 1"),
        ("a: \x07\n", "line 1"),
        ("%YAML 9\n---\na\n", "line 1"),
    ],
)
def test_what_is_no_yaml_is_said_with_the_line(text: str, where: str) -> None:
    with pytest.raises(FormatError, match=rf"no valid YAML in merge\.yml, {where}") as caught:
        read(text, "merge.yml")
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["", "---\n---\n", "# nothing\n", "null\n"],
)
def test_nothing_is_no_recipe(text: str) -> None:
    with pytest.raises(FormatError, match=r"nothing in merge\.yml"):
        read(text, "merge.yml")


def test_aliases_that_never_end() -> None:
    with pytest.raises(FormatError, match=r"line 1, column 4, contains itself"):
        read("a: &x [*x]\n", "merge.yml")
    laughs = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    for last, name in zip("abcdefgh", "bcdefghi", strict=True):
        laughs += f"{name}: &{name} [{', '.join(['*' + last] * 10)}]\n"
    with pytest.raises(FormatError, match="makes more than"):
        read(laughs, "merge.yml")
    with pytest.raises(FormatError, match="nested too deeply"):
        read("[" * 1500, "merge.yml")


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ("base_model: a\nexperts: [{source_model: b}]\n", "mergekit-moe"),
        ("base_model: a\ngate_mode: hidden\n", "mergekit-moe"),
        ("layer_slices: [{model: a, start: 0, end: 4}]\n", "bakllama"),
        ("genome: {models: [a, b]}\ntasks: []\n", "mergekit-evolve"),
        ("model: a\ndonor: b\n", "mergekit-tokensurgeon"),
        ("models: [a]\nfull_random: true\n", "mergekit-layershuffle"),
    ],
)
def test_recipes_of_other_tools_are_refused_by_name(text: str, tool: str) -> None:
    with pytest.raises(Unsupported, match=rf"merge\.yml is a recipe for {tool} \(it has"):
        read(text, "merge.yml")


@pytest.mark.parametrize("key", ["finetune", "rank", "max_rank"])
def test_extraction_stands_in_a_file_of_its_own(key: str) -> None:
    with pytest.raises(Unsupported, match="has an extraction recipe among") as caught:
        read(f"base_model: a\n{key}: 16\n", "merge.yml")
    assert "weft run extraction.yml" in (caught.value.hint or "")


def test_a_parameter_of_another_method_is_said_to_do_nothing() -> None:
    (found,) = read(LINEAR + "parameters: {int8_mask: true, density: 7}\n", "merge.yml")
    assert [note.split("; ")[1] for note in found.notes] == [
        "linear does not read it, here as in MergeKit"
    ] * 2
    assert found.parameters == {}


def test_a_density_above_one_keeps_all_and_is_said() -> None:
    """As in MergeKit, which says nothing."""
    text = "merge_method: ties\nbase_model: a\nmodels: [{model: b}]\n"
    (found,) = read(text + "parameters: {weight: 1, density: 50}\n", "merge.yml")
    assert list(found.notes) == ["a density of 50 keeps all of b: it is a share, up to 1"]


@pytest.mark.parametrize(
    ("method", "line", "said"),
    [
        ("sce", "select_topk: 2", "a select_topk of 2 selects all: it is a share, up to 1"),
        (
            "della",
            "weight: 1, epsilon: 0.6",
            "an epsilon of 0.6 changes nothing where the density is 1",
        ),
    ],
)
def test_a_share_above_its_range_is_said(method: str, line: str, said: str) -> None:
    """And runs, as in MergeKit, which says nothing."""
    text = f"merge_method: {method}\nbase_model: a\nmodels: [{{model: b}}, {{model: c}}]\n"
    (found,) = read(text + f"parameters: {{{line}}}\n", "merge.yml")
    assert found.notes == (said,)


def test_a_density_that_nothing_reads_is_said() -> None:
    text = "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: b}]\n"
    (found,) = read(text + "parameters: {weight: 1, density: 0.3}\n", "merge.yml")
    (note,) = found.notes
    assert "task_arithmetic keeps all of a task vector: density changes nothing" in note


def test_a_base_that_is_merged_like_any_model_is_said() -> None:
    text = "merge_method: karcher\nbase_model: c\nmodels: [{model: a}, {model: b}]\n"
    (found,) = read(text, "merge.yml")
    assert found.notes == (
        (
            "c is merged like the others: to karcher a base is a model like any other, "
            "and it is not among the models"
        ),
    )


@pytest.mark.parametrize(
    "what", ["unknown method", "no method", "unknown key", "a filter without a value", "no layers"]
)
def test_the_json_schema_sees_it_too(what: str) -> None:
    import yaml

    data = yaml.safe_load(MISTAKES[what][0])
    assert json_schema.problems(schema.json_schema(), data)


def test_no_mistake_of_the_user_is_a_defect_of_weft() -> None:
    assert issubclass(RecipeError, WeftError)
    assert RecipeError.exit_code == 2


def test_a_circle_is_said_of_its_own_documents_only() -> None:
    """Not of the last one, which has no name and only uses them."""
    message = refused(f"name: a\n{ONE}b}}]\n---\nname: b\n{ONE}a}}]\n---\n{ONE}a}}]\n")
    assert message.startswith("1 problem in")
    assert "None" not in message


def test_a_colon_may_belong_to_a_path() -> None:
    (found,) = read(f"{ONE}{{model: a, lora: {{path: 'run:b', weight: 0.5}}}}}}]\n", "merge.yml")
    assert found.models()[0].adapters == (("run:b", None, 0.5),)
    (found,) = read(f"{ONE}'a+C:/adapters/b:0.5'}}]\n", "merge.yml")
    assert found.models()[0].adapters == (("C:/adapters/b", None, 0.5),)


def test_an_empty_list_is_said_to_say_nothing() -> None:
    """As in MergeKit, where the default counts then."""
    text = "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {density: []}}]\n"
    (found,) = read(text + "parameters: {weight: 1}\n", "merge.yml")
    assert found.notes == (
        (
            "`density` is an empty list, which says nothing, as in MergeKit "
            "(models[0].parameters.density, line 3)"
        ),
    )
