"""Recipes as people write them: each is read, and says what it is meant to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import json_schema
from weft.recipes import schema
from weft.recipes._yaml import load
from weft.recipes.mergekit import read
from weft.recipes.records import Condition, ModelName, Recipe, Token, Tokenizer

CORPUS = {path.stem: path for path in sorted((Path(__file__).parent / "corpus").glob("*.yml"))}
# method, models of the slices of the modules (`;` between slices, `|` between modules)
SAID = {
    "anchors": "dare_ties org/base,org/a,org/b",
    "arcee-fusion": "arcee_fusion org/a,org/b",
    "breadcrumbs": "breadcrumbs org/a,org/b,org/base",
    "breadcrumbs-ties": "breadcrumbs_ties org/a,org/b,org/base",
    "chat-template-literal": "linear org/a,org/b",
    "dare-linear-lambda": "dare_linear org/a,org/base",
    "dare-ties-seven": "dare_ties org/base,org/a,org/b,org/c,org/d",
    "della": "della org/a,org/b,org/base",
    "della-linear": "della_linear org/a,org/b,org/base",
    "karcher": "karcher org/a,org/b,org/c",
    "linear-shared-weight": "linear ./runs/step-1000,./runs/step-2000,./runs/step-3000",
    "linear-two": "linear teknium/OpenHermes-2.5-Mistral-7B,HuggingFaceH4/zephyr-7b-beta",
    "mapping-names": "task_arithmetic org/a@v1+./l+1@r,org/b@v2+org/x+y:0.5,./models/a+b@c",
    "model-stock": "model_stock org/base,org/a,org/b,org/c",
    "multislerp": "multislerp org/a,org/b,org/c",
    "nearswap": "nearswap org/a,org/b",
    "nuslerp": "nuslerp org/a,org/b,org/base",
    "old-by-model": "linear org/a[0:8],org/b[0:8]",
    "old-legacy": "slerp org/base,org/a",
    "passthrough-one-adapter": "passthrough org/base+org/adapter",
    "passthrough-scale": "passthrough org/a[0:16];org/a[8:24];org/a[24:24]",
    "passthrough-stack": "passthrough psmathur/orca_mini_v3_13b[0:24];"
    "garage-bAInd/Platypus2-13B[20:40]",
    "ram": "ram org/a,org/b,org/base",
    "ramplus": "ramplus_tl org/a,org/b,org/base",
    "sce": "sce org/a,org/b,org/base",
    "slerp-gradient": "slerp psmathur/orca_mini_v3_13b[0:40],garage-bAInd/Platypus2-13B[0:40]",
    "slerp-models": "slerp org/instruct,org/coder",
    "slice-base": "ties org/base[0:8],org/a[0:8];org/a[8:16],org/b[8:16]",
    "state-dicts": "dare_ties model_a.safetensors,model_b.safetensors,model_base.safetensors",
    "task-arithmetic-adapters": "task_arithmetic meta-llama/Llama-3.1-8B+org/lora-sql,"
    "meta-llama/Llama-3.1-8B@main+./adapters/chat@v2:0.7+./adapters/tone:-0.3,"
    "meta-llama/Llama-3.1-8B",
    "ties-base-appended": "ties org/math,org/chat,org/base",
    "ties-base-listed": "ties mistralai/Mistral-7B-v0.1,org/math,org/chat",
    "tokenizer-union": "linear org/a,org/b",
    "vision-modules": "ties org/vlm-a,org/vlm-b,org/vlm|org/vlm[0:12],org/vlm-a[0:12]"
    "|org/vlm-a,org/vlm",
}
SEVERAL = {
    "multi": [
        ("left", "task_arithmetic org/a,org/base"),
        ("linear", "passthrough org/b"),
        ("final-but-first", "linear left,linear+org/adapter"),
        (None, "slerp left,final-but-first"),
    ],
    "old-mega": [
        ("./models/half", "slerp org/a[0:40],org/b[0:40]"),
        (None, "ties ./models/half,org/base"),
    ],
}

pytestmark = pytest.mark.usefixtures("mergekit_methods")


def recipes(stem: str) -> list[Recipe]:
    return read(CORPUS[stem].read_text(), f"{stem}.yml")


def recipe(stem: str) -> Recipe:
    (found,) = recipes(stem)
    return found


def said(found: Recipe) -> str:
    modules = []
    for module in found.modules:
        slices = []
        for each in module.slices:
            sources = [
                f"{s.model}" + (f"[{s.layers[0]}:{s.layers[1]}]" if s.layers else "")
                for s in each.sources
            ]
            slices.append(",".join(sources))
        modules.append(";".join(slices))
    return f"{found.method} {'|'.join(modules)}"


def test_every_recipe_is_looked_at() -> None:
    assert set(SAID) | set(SEVERAL) == set(CORPUS)
    assert len(CORPUS) > 30


@pytest.mark.parametrize("stem", SAID)
def test_a_recipe_says_what_it_is_meant_to(stem: str) -> None:
    found = recipe(stem)
    assert said(found) == SAID[stem]
    assert found.text == CORPUS[stem].read_text()
    assert bool(found.notes) == (stem.startswith("old") or stem in ("model-stock", "slice-base"))


@pytest.mark.parametrize("stem", SEVERAL)
def test_documents_come_in_the_order_they_run_in(stem: str) -> None:
    found = recipes(stem)
    assert [(each.name, said(each)) for each in found] == SEVERAL[stem]
    assert {each.text for each in found} == {CORPUS[stem].read_text()}


# Spellings of long ago are read, and not offered to anyone who writes a recipe today.
@pytest.mark.parametrize("stem", sorted(set(CORPUS) - {"old-by-model", "old-mega"}))
def test_the_json_schema_agrees(stem: str) -> None:
    for document in load(CORPUS[stem].read_text(), stem):
        assert json_schema.problems(schema.json_schema(), document.data) == []


def test_numbers_that_yaml_takes_for_text() -> None:
    assert recipe("slerp-models").parameters == {"t": (Condition(0.3),)}
    assert recipe("karcher").parameters["tol"] == (Condition(1e-5),)
    assert recipe("dare-linear-lambda").parameters["rescale"] == (Condition(True),)


def test_what_was_understood_of_old_spellings() -> None:
    """One line about each; none of what means today what it always meant."""
    said = {stem: [list(each.notes) for each in recipes(stem)] for stem in SAID if "old" in stem}
    said |= {stem: [list(each.notes) for each in recipes(stem)] for stem in SEVERAL}
    assert said == {
        "old-by-model": [
            [
                (
                    "`input_model_parameters` counts after a slice's own parameters and before the "
                    "recipe's"
                ),
                "`pattern` is read as `filter` (1 of them)",
            ]
        ],
        "old-legacy": [
            [
                (
                    "`normalize` is a parameter of breadcrumbs, breadcrumbs_ties, dare_linear and "
                    "6 more; slerp does not read it, here as in MergeKit"
                )
            ]
        ],
        "old-mega": [
            [
                "`out_path` is not written to: other documents may name the model by it",
                "`dtype: fp16` is read as `dtype: float16`",
            ],
            [
                "`tokenizer_source: model:org/a` is read as `org/a`",
                (
                    "`consensus_method` is no longer read by MergeKit either: signs are elected by "
                    "the sum"
                ),
                (
                    "`embed_slerp` is no longer read by MergeKit either: embeddings are merged "
                    "like all else"
                ),
            ],
        ],
        "multi": [[], [], [], []],
    }
    text = "merge_method: linear\nmodel_parameters: {a: {weight: 1}, b: {weight: 2}}\n"
    text += "slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]"
    (found,) = read(f"{text}, residual_weight: 0.5}}]\n", "old.yml")
    assert found.notes[0] == "`model_parameters` is read as `input_model_parameters`"
    assert found.notes[2] == "`residual_weight` is used by nothing (slices[0], line 3)"


def test_filters_and_gradients() -> None:
    assert recipe("slerp-gradient").parameters["t"] == (
        Condition((0.0, 0.5, 0.3, 0.7, 1.0), "self_attn"),
        Condition((1.0, 0.5, 0.7, 0.3, 0.0), "mlp"),
        Condition(0.5),
    )


def test_dtypes() -> None:
    assert recipe("ties-base-appended").dtype == "bfloat16"
    assert recipe("ties-base-appended").out_dtype == "float16"
    assert recipe("karcher").dtype == "bfloat16"
    assert recipes("old-mega")[0].dtype == "float16"


def test_an_appended_base_has_no_parameters() -> None:
    base = recipe("ties-base-appended").modules[0].slices[0].sources[-1]
    assert (base.model, base.layers, base.parameters) == (ModelName("org/base"), None, {})
    assert base.where == "base_model"
    assert base.model == recipe("ties-base-appended").base_model


def test_merge_keys_and_their_exceptions() -> None:
    first, second = recipe("anchors").modules[0].slices[0].sources[1:]
    assert first.parameters == {"weight": (Condition(0.4),), "density": (Condition(0.6),)}
    assert second.parameters == {"weight": (Condition(0.2),), "density": (Condition(0.6),)}


def test_names_written_out_may_hold_what_means_something_else() -> None:
    a, b, base = (s.model for s in recipe("mapping-names").modules[0].slices[0].sources)
    assert a == ModelName("org/a", "v1", (("./l+1", "r", 1.0),), "LlamaForCausalLM")
    assert b == ModelName("org/b", "v2", (("org/x", None, 1.0), ("y", None, 0.5)))
    assert base == ModelName("./models/a+b@c")


def test_adapters_with_weights() -> None:
    adapters = recipe("task-arithmetic-adapters").modules[0].slices[0].sources[1].model.adapters
    assert adapters == (("./adapters/chat", "v2", 0.7), ("./adapters/tone", None, -0.3))


def test_tokens() -> None:
    a, b = ModelName("org/a"), ModelName("org/b")
    found = recipe("tokenizer-union").tokenizer
    assert found == Tokenizer(
        "union",
        {
            "<|im_start|>": Token(a),
            "<|im_end|>": Token(b, token="</s>", force=True),
            "<|pad|>": Token(zero=True),
            "<|new|>": Token(b, token_id=7),
            "<|old|>": Token(),
        },
        64,
    )
    assert recipe("slerp-models").tokenizer == Tokenizer("base")
    assert recipe("chat-template-literal").tokenizer == Tokenizer(b)
    assert recipes("old-mega")[1].tokenizer == Tokenizer(a)
    assert recipe("linear-two").tokenizer is None


def test_modules() -> None:
    text, vision, _ = recipe("vision-modules").modules
    assert (text.name, text.where) == ("text_decoder", "modules.text_decoder")
    assert text.parameters == {"density": (Condition(0.6),)}
    assert vision.slices[0].sources[1].where == "modules.vision_tower.slices[0].sources[1]"


def test_a_slice_may_have_a_base_of_its_own() -> None:
    first, second = recipe("slice-base").modules[0].slices
    assert (first.base_model, second.base_model) == (ModelName("org/base"), ModelName("org/b"))
    assert first.parameters == {"density": (Condition(0.2),)}


def test_parameters_by_model_count_after_those_of_the_slice() -> None:
    a, b = recipe("old-by-model").modules[0].slices[0].sources
    assert a.parameters["weight"] == (Condition(0.25),)
    assert b.parameters["weight"] == (Condition(0.9, "mlp"), Condition(0.75))


def test_reading_needs_no_torch() -> None:
    program = (
        "import sys; from weft.recipes import mergekit, schema; schema.json_schema(); "
        "mergekit.read('merge_method: linear\\nmodels: [{model: a, parameters: {weight: 1}}]'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_positions_are_those_of_the_keys() -> None:
    found = recipe("ties-base-listed")
    lines = found.text.splitlines()
    assert found.positions["models[1].parameters.density"] == (6, 7)
    for place, (line, column) in found.positions.items():
        key = place.rsplit(".", 1)[-1]
        if not key.endswith("]"):
            assert lines[line - 1][column - 1 :].startswith(f"{key}:")
    assert found.positions["models[2].parameters.weight[1].value"] == (14, 11)
