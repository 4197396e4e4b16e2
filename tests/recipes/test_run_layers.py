"""Which tensors are layers, what becomes of those that are none, what the config says of each."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import weft
from tests.recipes.parity_models import write_adapter, write_model
from weft.plan._replicated import _ALTERNATING, _WITHOUT_POSITIONS, told_by_number
from weft.plan._stacks import Stack, stacks

_KINDS = ("layer_types", "attention_layers")


def run(
    folder: Path, recipe: dict[str, Any] | str, out: str = "out"
) -> tuple[weft.Report, dict[str, Any]]:
    text = recipe if isinstance(recipe, str) else json.dumps(recipe)
    (folder / "recipe.yml").write_text(text)
    report = weft.run(folder / "recipe.yml", output=folder / out)
    found: dict[str, Any] = {}
    for file in (folder / out).glob("*.safetensors"):
        found |= load_file(file)
    return report, found


def test_a_tower_that_the_config_does_not_count() -> None:
    text = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(5)]
    vision = [f"vision.layers.{n}.attn.weight" for n in range(3)]
    found = stacks([*text, *vision], {"vision_config": {"num_hidden_layers": 3}})
    assert set(found) == {Stack("model.layers", 5), Stack("vision.layers", 3)}


def test_what_predicts_further_tokens_is_behind_the_layers() -> None:
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(5)]
    names.append("model.layers.4.eh_proj.weight")
    assert stacks(names, {"num_hidden_layers": 4}) == [Stack("model.layers", 4)]


def test_an_untied_config_has_its_head(tmp_path: Path) -> None:
    """The last slice is of a tied model: its head is its embedding."""
    write_model(tmp_path / "untied", "llama", 1)
    write_model(tmp_path / "tied", "llama", 2, tied=True)
    slices = [
        {"sources": [{"model": str(tmp_path / "untied"), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(tmp_path / "tied"), "layer_range": [2, 3]}]},
    ]
    report, found = run(tmp_path, {"merge_method": "passthrough", "slices": slices})
    tied = load_file(tmp_path / "tied" / "model.safetensors")
    np.testing.assert_array_equal(found["lm_head.weight"], tied["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert report.warnings == ()


def test_gradients_end_in_a_single_layer_and_leave_the_rest_at_its_begin(tmp_path: Path) -> None:
    """As in MergeKit, a list of one layer is at 1, and what is in no layer at 0."""
    for number, name in enumerate(("a", "b")):
        write_model(tmp_path / name, "llama", number, layers=1)
    models = [
        {"model": str(tmp_path / "a"), "parameters": {"weight": [1, 0]}},
        {"model": str(tmp_path / "b"), "parameters": {"weight": [0, 1]}},
    ]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    _, found = run(tmp_path, {"merge_method": "linear", "models": models, "dtype": "float32"})
    for name, value in found.items():
        want = b if ".layers.0." in name else a
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_a_head_that_a_tied_slice_brings_is_at_the_begin_of_gradients(tmp_path: Path) -> None:
    write_model(tmp_path / "untied", "llama", 1)
    for number, name in enumerate(("one", "two"), 2):
        write_model(tmp_path / name, "llama", number, tied=True)
    last = [
        {"model": str(tmp_path / name), "layer_range": [2, 3], "parameters": {"weight": weight}}
        for name, weight in (("one", [1, 0]), ("two", [0, 1]))
    ]
    first = {"model": str(tmp_path / "untied"), "layer_range": [0, 2], "parameters": {"weight": 1}}
    slices = [{"sources": [first]}, {"sources": last}]
    _, found = run(tmp_path, {"merge_method": "linear", "slices": slices, "dtype": "float32"})
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    np.testing.assert_array_equal(found["lm_head.weight"], one["model.embed_tokens.weight"])
    name = "mlp.up_proj.weight"
    np.testing.assert_array_equal(found[f"model.layers.2.{name}"], two[f"model.layers.2.{name}"])


def test_weights_that_cancel_but_for_rounding(tmp_path: Path) -> None:
    write_model(tmp_path / "a", "llama", 1)
    write_model(tmp_path / "b", "llama", 2)
    write_model(tmp_path / "c", "llama", 3)
    models = [
        {"model": str(tmp_path / name), "parameters": {"weight": weight}}
        for name, weight in (("a", 0.1), ("b", 0.2), ("c", -0.3))
    ]
    with pytest.raises(weft.WeftError, match="add up to 0"):
        run(tmp_path, {"merge_method": "linear", "models": models})
    assert not (tmp_path / "out").exists()


def test_no_layer_left(tmp_path: Path) -> None:
    write_model(tmp_path / "a", "llama", 1)
    slices = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": [2, 2]}]}]
    with pytest.raises(weft.WeftError, match="no layer is left"):
        run(tmp_path, {"merge_method": "passthrough", "slices": slices})


def test_a_document_that_nothing_uses_is_told(tmp_path: Path) -> None:
    write_model(tmp_path / "a", "llama", 1)
    model = str(tmp_path / "a")
    documents = [
        {"name": "first", "merge_method": "passthrough", "models": [{"model": model}]},
        {"merge_method": "passthrough", "models": [{"model": model}]},
    ]
    (tmp_path / "recipe.yml").write_text("\n---\n".join(map(json.dumps, documents)))
    made = weft.plan_run(tmp_path / "recipe.yml")
    assert any("no document uses first" in warning for warning in made.warnings)


def test_an_extraction_adds_no_layers(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "llama", None)
    write_model(tmp_path / "deep", "llama", 1, layers=5)
    with pytest.raises(weft.WeftError, match=r"has 5 layers in .* and 3 in"):
        weft.extract(tmp_path / "deep", base=tmp_path / "base", output=tmp_path / "ad", rank=4)
    assert not (tmp_path / "ad").exists()


# ---------------------------------------------------------------- the config, layer for layer


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def stack(folder: Path, *ranges: tuple[str, int, int]) -> dict[str, Any]:
    """Layers of models in `folder`, one after the other; the config of what that makes."""
    slices = [
        {"sources": [{"model": str(folder / name), "layer_range": [start, stop]}]}
        for name, start, stop in ranges
    ]
    run(folder, {"merge_method": "passthrough", "slices": slices})
    config: dict[str, Any] = json.loads((folder / "out/config.json").read_text())
    return config


@pytest.mark.parametrize(
    ("a", "b", "out"),
    [
        (
            {"no_rope_layers": [1, 1, 0], "no_rope_layer_interval": 3, "model_type": "smollm3"},
            {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2},
            {"no_rope_layers": [1, 1, 0, 0, 1], "no_rope_layer_interval": 3},
        ),
        (
            {"layer_types": ["x", "x", "y"], "model_type": "gemma3_text"},
            {"layer_types": ["x", "y", "z"]},
            {"layer_types": ["x", "x", "y", "y", "z"]},
        ),
        (
            {"mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["x", "y", "z"]},
            {"mlp_layer_types": ["dense", "dense", "sparse"]},
            {
                "mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse"],
                "layer_types": ["x", "y", "z", "y", "z"],
            },
        ),
        (
            {"intermediate_size": [48, 49, 50], "full_attn_idxs": [0, 2]},
            {"intermediate_size": [51, 52, 53], "full_attn_idxs": [1]},
            {"intermediate_size": [48, 49, 50, 52, 53], "full_attn_idxs": [0, 2, 3]},
        ),
        ({"moe_layers": [2]}, {"moe_layers": [0, 1]}, {"moe_layers": [2, 3]}),
        (
            {"block_configs": [{"n": 0}, {"n": 1}, {"n": 2}]},
            {"block_configs": [{"n": 3}, {"n": 4}, {"n": 5}]},
            {"block_configs": [{"n": n} for n in (0, 1, 2, 4, 5)]},
        ),
        ({"eos_token_id": [1, 2, 3]}, {"eos_token_id": [4, 5, 6]}, {"eos_token_id": [1, 2, 3]}),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_lists_of_what_each_layer_is(
    a: dict[str, Any], b: dict[str, Any], out: dict[str, Any], tmp_path: Path
) -> None:
    """Each layer takes its entry along, whichever model it comes from."""
    for seed, (name, fields) in enumerate((("a", a), ("b", b)), 1):
        write_model(tmp_path / name, "llama", seed)
        edit(tmp_path / name, **fields)
    config = stack(tmp_path, ("a", 0, 3), ("b", 1, 3))
    assert config["num_hidden_layers"] == 5
    assert {key: config[key] for key in out} == out


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "gpt_neo"}, "model_type = gpt_neo"),
        ({"model_type": "olmo3", "sliding_window": 4}, "model_type = olmo3"),
        ({"model_type": "qwen3_next"}, "model_type = qwen3_next"),
        ({"model_type": "llama4_text", "no_rope_layers": []}, "model_type = llama4_text"),
        ({"no_rope_layer_interval": 4, "layer_types": ["x"] * 3}, "no_rope_layer_interval = 4"),
        ({"sliding_window_pattern": 2}, "sliding_window_pattern = 2"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers = 1"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace = 1"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers = 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_their_number_tells_apart(
    fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """A layer in another place would become one of another kind; in its own it stays what it is."""
    write_model(tmp_path / "a", "llama", 1)
    edit(tmp_path / "a", **fields)
    with pytest.raises(weft.WeftError) as error:
        stack(tmp_path, ("a", 0, 2), ("a", 1, 3))
    assert f"the config gives a layer its kind by its number ({reason})" in str(error.value)
    assert "layer 2 would become another" in str(error.value)
    assert not (tmp_path / "out").exists()
    assert stack(tmp_path, ("a", 0, 1), ("a", 1, 2))["num_hidden_layers"] == 2


def test_models_that_alternate_and_do_not_say_it() -> None:
    """As transformers builds them where the config has no list."""
    transformers = pytest.importorskip("transformers")
    for kind in sorted(_ALTERNATING | _WITHOUT_POSITIONS):
        config = transformers.AutoConfig.for_model(kind, num_hidden_layers=24)
        names = ("no_rope_layers",) if kind in _WITHOUT_POSITIONS else _KINDS
        kinds = next(found for name in names if (found := getattr(config, name, None)))
        assert len(set(kinds)) > 1, kind
        assert told_by_number({"model_type": kind}) == [f"model_type = {kind}"]
        assert not told_by_number({"model_type": kind, "layer_types": kinds, "no_rope_layers": [1]})


TEXT = ["full", "sliding", "linear"]
VISION = ["window", "global"]


@pytest.mark.parametrize(
    ("layers", "text", "vision"),
    [
        (3, [[0, 3], [1, 3]], [[0, 2]]),
        (3, [[0, 2]], [[0, 2]]),
        (3, [[0, 3]], [[0, 1]]),
        (3, [[0, 2]], [[0, 2], [1, 2]]),
        (2, [[0, 2], [1, 2]], [[0, 2]]),
        (2, [[0, 2]], [[0, 1]]),
    ],
)
def test_layers_are_counted_in_the_part_that_has_them(
    layers: int, text: list[list[int]], vision: list[list[int]], tmp_path: Path
) -> None:
    """Of the two parts of a config the one whose layers change; also where both count as many."""
    write_model(tmp_path / "a", "gemma3vl", 1, layers=layers)
    config = json.loads((tmp_path / "a/config.json").read_text())
    of_text = config.pop("text_config") | {"layer_types": TEXT[:layers]}
    of_vision = config.pop("vision_config") | {"layer_types": VISION}
    config |= {"vision_config": of_vision, "text_config": of_text}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    model = str(tmp_path / "a")
    modules = {
        name: {"slices": [{"sources": [{"model": model, "layer_range": r}]} for r in ranges]}
        for name, ranges in (("text_decoder", text), ("vision_tower", vision))
    }
    modules["multi_modal_projector"] = {"models": [{"model": model}]}  # type: ignore[dict-item]
    _, found = run(tmp_path, {"merge_method": "passthrough", "modules": modules})
    made = json.loads((tmp_path / "out/config.json").read_text())
    for part, kinds, ranges, path in (
        ("text_config", TEXT, text, "language_model.model.layers"),
        ("vision_config", VISION, vision, "vision_tower.vision_model.encoder.layers"),
    ):
        order = [n for start, stop in ranges for n in range(start, stop)]
        assert made[part]["num_hidden_layers"] == len(order), part
        assert made[part]["layer_types"] == [kinds[n] for n in order], part
        numbers = {name[len(path) + 1 :].split(".")[0] for name in found if name.startswith(path)}
        assert numbers == {str(n) for n in range(len(order))}


# ------------------------------------------------------------------- an adapter in every place

ADAPTED = {
    "sources": (
        "llama",
        3,
        """
        merge_method: linear
        slices:
          - sources:
              - {model: base+adapter, layer_range: [0, 2], parameters: {weight: 3}}
              - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
          - sources:
              - {model: a, layer_range: [2, 3], parameters: {weight: 1}}
              - {model: base+adapter, layer_range: [2, 3], parameters: {weight: 3}}
        """,
    ),
    "base of a slice": (
        "llama",
        2,
        """
        merge_method: task_arithmetic
        base_model: base
        parameters: {weight: 0.5}
        slices:
          - base_model: base+adapter
            sources:
              - {model: base+adapter, layer_range: [0, 2]}
              - {model: a, layer_range: [0, 2]}
          - sources:
              - {model: base, layer_range: [2, 3]}
              - {model: a, layer_range: [2, 3]}
        """,
    ),
    "modules": (
        "gemma3vl",
        3,
        """
        merge_method: linear
        parameters: {weight: 1}
        modules:
          text_decoder: {models: [model: base+adapter, model: a]}
          vision_tower: {models: [model: a]}
          multi_modal_projector: {models: [model: base+adapter]}
        """,
    ),
}


@pytest.mark.parametrize("where", ADAPTED)
def test_an_adapter_wherever_a_model_may_stand(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had been merged first, in float32, and written."""
    kind, changed, text = ADAPTED[where]
    monkeypatch.chdir(tmp_path)
    write_model(Path("base"), kind, None)
    write_model(Path("a"), kind, 1)
    root = "model" if kind == "llama" else "model.language_model"
    write_adapter(Path("adapter"), rms=0.01, root=root)
    weft.merge("base", "adapter", output="merged")
    made = [
        run(tmp_path, textwrap.dedent(text.replace("base+adapter", model)), f"out{number}")[1]
        for number, model in enumerate(("base+adapter", "merged", "base"))
    ]
    found, first, without = made
    assert found.keys() == first.keys() == without.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, first[name], rtol=0, atol=2e-8)
    moved = [name for name in found if np.abs(found[name] - without[name]).max() > 1e-3]
    assert len(moved) == changed
    assert all("q_proj" in name for name in moved)
