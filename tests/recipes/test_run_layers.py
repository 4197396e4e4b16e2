"""Which tensors are layers, and what becomes of those that are none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import weft
from tests.recipes.parity_models import write_model
from weft.plan._stacks import Stack, stacks

if TYPE_CHECKING:
    from pathlib import Path


def run(folder: Path, recipe: dict[str, Any]) -> tuple[weft.Report, dict[str, Any]]:
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    report = weft.run(folder / "recipe.yml", output=folder / "out")
    found: dict[str, Any] = {}
    for file in (folder / "out").glob("*.safetensors"):
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
