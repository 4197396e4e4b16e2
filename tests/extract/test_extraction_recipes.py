"""Extraction recipes: the YAML of the issue as it is, and every mistake with its place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pairs
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from weft.cli.app import main
from weft.core.errors import RecipeError, WeftError

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = """\
finetune: path or org/name or model+lora
base_model: path or org/name
rank: 128
alpha: 128
targeted_modules:
  filter: self_attn, mlp, lm_head
saved_modules:
  filter: input_layernorm, embed_tokens, norm
""".replace("path or org/name or model+lora", "tuned").replace("path or org/name", "base")


def with_mlp(root: Path) -> None:
    """TUNED and BASE, of which some matrices are an MLP's."""
    pairs.pair(root)
    for name in ("tuned", "base"):
        file = root / name / "model.safetensors"
        tensors = load_file(file)
        save_file(
            {n.replace("self_attn.down", "mlp.down"): W for n, W in tensors.items()}, file,
            {"format": "pt"},
        )  # fmt: skip


def test_the_recipe_of_its_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_mlp(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yml").write_text(RECIPE)
    report = weft.run("e.yml", output="adapter")
    weft.extract(
        "tuned",
        base="base",
        output="same",
        rank=128,
        alpha=128,
        target="self_attn, mlp, lm_head",
        save="input_layernorm, embed_tokens, norm",
    )
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "same"))
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (128, 128, {})
    assert set(config["modules_to_save"]) == {
        *("model.embed_tokens", "lm_head", "model.norm"),
        *(f"model.layers.{layer}.input_layernorm" for layer in range(2)),
    }
    decomposed = {name.split(".", 3)[-1] for name in report.manifest["modules"]}
    assert decomposed == {
        *("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.o_proj.weight"),
        "mlp.down_proj.weight",
    }
    # The head is asked for, too, and smaller in full than as factors of its whole rank.
    assert "smaller in full" in report.manifest["saved"]["lm_head.weight"]["why"]


def test_the_command_runs_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_mlp(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yml").write_text(RECIPE)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["run", "e.yml", *arguments])
        said = capsys.readouterr()
        assert end.value.code == 0, said.err
        return said.out

    assert run("--check") == "e.yml: sound; an adapter, rank 128\n"
    text = run("-o", "out", "--dry-run")
    assert "ranks    rank 128" in text
    assert "decompose (linear)" in text
    assert text.splitlines()[-1].startswith("dry run: nothing was read or written")
    planned = json.loads(run("-o", "out", "--dry-run", "--json"))
    assert planned["operation"] == "extract"
    assert run("-o", "out", "--dry-run", "--quiet") == ""
    assert not (tmp_path / "out").exists()
    text = run("-o", "out")
    assert text.startswith("8 modules of ranks 96 to 128, ")
    assert f"in {tmp_path / 'out'}" in text or " in out, " in text
    found = json.loads(run("-o", "again", "--json"))
    assert found["output"] == "again"
    assert found["manifest"] == json.loads((tmp_path / "again" / "weft.json").read_text())
    assert found["manifest"]["plan"] == planned["plan"]
    assert run("-o", "silent", "--quiet") == ""
    assert (tmp_path / "silent" / "adapter_config.json").exists()


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
        ("finetune: a\nbase_model: b\nrank:\n  - {valu: 3}\n", "@ rank[0], line 4, column 6"),
        ("finetune: a\nbase_model: b\ntargeted_modules: {filtr: x}\n", 'did you mean "filter"?'),
        ("finetune: a\nbase_model: b\ntargeted_modules: {x: y}\n", "known here: filter"),
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


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once, with their lines: as in a recipe of a merge."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yml").write_text("rank: 4\nfinetune: ./tuned\nbase_model: ./base\n")
    for run in (weft.plan_run, lambda path: weft.run(path, output="out")):
        with pytest.raises(RecipeError) as error:
            run("e.yml")
        text = str(error.value)
        assert "2 problems in e.yml" in text
        assert "./tuned" in text
        assert "finetune, line 2, column" in text
        assert "./base" in text
        assert "base_model, line 3, column" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ("[{value: 2}, {value: 3}]", "a second entry of `rank` without a filter"),
        ("[{filter: q_proj, value: 2}, {filter: q_proj, value: 3}]", "q_proj has two ranks, 2 and"),
        ("[{filter: q_proj, vlaue: 3}]", 'did you mean "value"'),
    ],
)
def test_ranks_that_contradict_each_other(tmp_path: Path, rank: str, message: str) -> None:
    pairs.pair(tmp_path)
    text = f"finetune: {tmp_path}/tuned\nbase_model: {tmp_path}/base\nrank: {rank}\n"
    (tmp_path / "e.yml").write_text(text)
    with pytest.raises(RecipeError) as error:
        weft.plan_run(tmp_path / "e.yml")
    assert message in str(error.value)
