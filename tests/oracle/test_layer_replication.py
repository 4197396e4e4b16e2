"""Adapters for a model that has the base's layers several times over."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from helpers import (
    MODELS,
    WARNINGS,
    config_of,
    load,
    logits,
    open_model,
    same_bytes,
    save_base,
    train,
    transformers,
    weft_merge,
)

import weft
from weft.core.errors import FormatError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

    from oracle.conftest import Lab

pytestmark = [pytest.mark.oracle, *map(pytest.mark.filterwarnings, WARNINGS)]

RANGES = [[0, 2], [1, 2], [0, 1]]  # 0 1 1 0
AUTO = "AutoModelForCausalLM"


def config(**options: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "down_proj"], "layer_replication": RANGES, **options}


def check(base: Path, folder: Path, options: dict[str, Any], auto: str = AUTO) -> dict[str, Any]:
    """What the trained model computes, unmerged, against the output; -> its config."""
    trained = train(base, auto, options)
    trained.save_pretrained(folder / "adapter")
    want = logits(trained.double())
    weft_merge(base, folder / "adapter", folder / "merged")
    merged, info = open_model(folder / "merged", auto, "float64", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (logits(merged) - want).abs().max() <= 1e-6 * want.abs().max()
    return config_of(folder / "merged")


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["lora", "dora", "head"],
)
def test_deeper(lab: Lab, tmp_path: Path, options: dict[str, Any]) -> None:
    """Each copy has its own update; PEFT's merge adds them all to the one that they share."""
    base = lab.make("llama-float32", save_base, "llama", "float32")
    after = check(base, tmp_path, config(**options))
    assert after == config_of(base) | {"num_hidden_layers": 4}
    before, merged = load(base), load(tmp_path / "merged")
    for new, old in enumerate([0, 1, 1, 0]):
        name = "model.layers.{}.self_attn.k_proj.weight"
        assert same_bytes(merged[name.format(new)], before[name.format(old)])
    q = [merged[f"model.layers.{n}.self_attn.q_proj.weight"] for n in (1, 2)]
    assert not same_bytes(*q)


def test_peft_adds_every_copy_to_one(lab: Lab, tmp_path: Path) -> None:
    """The unmerged model, Weft's output and PEFT's merge: the last one is not the trained model."""
    base = lab.make("llama-float32", save_base, "llama", "float32")
    check(base, tmp_path, config())
    trained = train(base, AUTO, config())
    want = logits(trained)
    theirs = logits(trained.merge_and_unload())
    ours = logits(open_model(tmp_path / "merged", AUTO))
    assert (ours - want).abs().max() < 1e-3 * want.abs().max()
    assert (theirs - want).abs().max() > 1e-1 * want.abs().max()


def test_bert(lab: Lab, tmp_path: Path) -> None:
    base = lab.make("bert-float32", save_base, "bert", "float32")
    options = config(target_modules=["query", "dense"])
    after = check(base, tmp_path, options, MODELS["bert"].auto)
    assert after["num_hidden_layers"] == 4


def test_layers_of_different_kinds(tmp_path: Path) -> None:
    """`layer_types` has an entry for each layer: a copy has the kind of its original."""
    made = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=112,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=48,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["full_attention", "sliding_attention"],
        )
    )
    made.save_pretrained(tmp_path / "base")
    trained = train(tmp_path / "base", AUTO, config())
    trained.save_pretrained(tmp_path / "adapter")
    weft_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert config_of(tmp_path / "merged")["layer_types"] == kinds


def test_layers_that_are_in_no_range(lab: Lab, tmp_path: Path) -> None:
    base = lab.make("llama-float32", save_base, "llama", "float32")
    after = check(base, tmp_path, config(layer_replication=[[1, 2], [1, 2]]))
    assert after["num_hidden_layers"] == 2


# ----------------------------------------------------------------------------------------- refused


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def folders(lab: Lab, tmp_path: Path) -> tuple[Path, Path]:
    base = lab.make("llama-float32", save_base, "llama", "float32")
    adapter = lab.make("deeper-adapter", lambda f: train(base, AUTO, config()).save_pretrained(f))
    for source, name in ((base, "base"), (adapter, "adapter")):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "base", tmp_path / "adapter"


def test_layers_that_the_base_lacks(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    edit(adapter / "adapter_config.json", layer_replication=[[0, 2], [1, 3]])
    with pytest.raises(PlanError, match=r"replicates layer 2, and model\.layers of .* has 2"):
        weft.plan_merge(base, adapter)


@pytest.mark.parametrize("value", [[[0]], [[2, 1]], [[0, "2"]], "0-2", [[0, 10**9]]])
def test_no_ranges(folders: tuple[Path, Path], value: Any) -> None:
    base, adapter = folders
    edit(adapter / "adapter_config.json", layer_replication=value)
    with pytest.raises(FormatError, match=r"layer_replication = .* a list of pairs"):
        weft.plan_merge(base, adapter)


def test_kinds_by_number(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    edit(base / "config.json", first_k_dense_replace=1)
    with pytest.raises(PlanError, match=r"by its number \(first_k_dense_replace = 1\)"):
        weft.plan_merge(base, adapter)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "gemma2"}, "model_type = gemma2"),
        ({"sliding_window_pattern": 6}, "sliding_window_pattern = 6"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers = 1"),
    ],
)
def test_attention_by_number(
    folders: tuple[Path, Path], fields: dict[str, object], reason: str
) -> None:
    """Where no `layer_types` says what a layer is, its number does."""
    base, adapter = folders
    edit(base / "config.json", **fields)
    with pytest.raises(PlanError, match=reason):
        weft.merge(base, adapter, output=base.parent / "out")


def test_with_an_adapter_of_the_base_itself(lab: Lab, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    plain = lab.make(
        "plain-adapter",
        lambda f: train(base, AUTO, config(layer_replication=None)).save_pretrained(f),
    )
    with pytest.raises(PlanError, match="differ in layer_replication"):
        weft.plan_merge(base, [adapter, plain])
