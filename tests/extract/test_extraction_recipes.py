"""Extraction recipes: the YAML of the issue as it is, and every mistake with its place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pairs
import pytest
import torch
from safetensors.torch import load_file

import weft
from weft.core.errors import RecipeError, WeftError

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = """\
finetune: tuned
base_model: base
rank: 128
alpha: 64
targeted_modules:
  filter: self_attn, mlp, lm_head
saved_modules:
  filter: input_layernorm, embed_tokens, norm
"""


def test_the_recipe_of_its_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yml").write_text(RECIPE.replace("mlp, ", ""))  # which this model does not have
    weft.run("e.yml", output="adapter")
    weft.extract(
        "tuned",
        base="base",
        output="same",
        rank=128,
        alpha=64,
        target="self_attn, lm_head",
        save="input_layernorm, embed_tokens, norm",
    )
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "same"))
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 64
    assert "model.embed_tokens" in config["modules_to_save"]


def test_ranks_by_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yml").write_text(
        "finetune: tuned\nbase_model: base\nembed: save\n"
        "rank:\n  - {filter: q_proj, value: 5}\n  - value: 3\n"
    )
    report = weft.run("e.yml", output="adapter")
    ranks = {n.split(".")[-2]: m["rank"] for n, m in report.manifest["modules"].items()}
    assert ranks == {"q_proj": 5, "down_proj": 3, "o_proj": 3, "k_proj": 3}


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        ("rank: auto", {"rank": "auto"}),
        ("energy: 0.5\ndtype: bfloat16\nexclude: {filter: o_proj}", {
            "energy": 0.5, "dtype": "bfloat16", "exclude": "o_proj",
        }),
        ("size: 90kB\nseed: 3", {"size": "90kB", "seed": 3}),
        ("rank: 4\nuniform_rank: true\nembed: skip", {
            "rank": 4, "uniform_rank": True, "embed": "skip",
        }),
    ],
)  # fmt: skip
def test_every_key_is_its_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, options: dict[str, Any]
) -> None:
    pairs.pair(tmp_path, torch.bfloat16, delta=pairs.low_rank(3, 2e-3))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yml").write_text(f"finetune: tuned\nbase_model: base\n{lines}\n")
    weft.run("e.yml", output="adapter")
    weft.extract("tuned", base="base", output="same", **options)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = (tmp_path / folder / name for folder in ("adapter", "same"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("finetune: a\nbase_modl: b\n", 'did you mean "base_model"?  @ line 2, column 1'),
        ("finetune: a\nbase_model: b\nrank: many\n", "@ rank, line 3, column 1"),
        ("finetune: a\nbase_model: b\nenergy: 3\n", "@ energy, line 3"),
        ("finetune: a\nbase_model: b\nrank:\n  - {valu: 3}\n", "@ rank[0], line 4, column 5"),
        ("finetune: a\nbase_model: b\ntargeted_modules: {filtr: x}\n", 'did you mean "filter"?'),
        ("finetune: a\nrank: 4\n", '"base_model" should name a model'),
        ("finetune: a\nbase_model: b\nrank: 4\nsize: 1MB\n", "rank and size are given"),
    ],
)
def test_mistakes_and_their_places(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "e.yml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        weft.run(tmp_path / "e.yml", output=tmp_path / "out")
    assert message in str(caught.value)


def test_an_adapter_has_no_shards(tmp_path: Path) -> None:
    (tmp_path / "e.yml").write_text(RECIPE)
    with pytest.raises(WeftError, match="which has one file"):
        weft.run(tmp_path / "e.yml", output=tmp_path / "out", max_shard_size="5GB")
