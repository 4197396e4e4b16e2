"""Tokenizers and bare state dicts through the whole of `weft run`, against the real MergeKit.

The truth is what mergekit 0.1.5 wrote, kept as fingerprints (`make_run_goldens.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from run_cases import (
    GOLDENS,
    PARTLY,
    STATE_DICTS,
    WITH_TOKENIZERS,
    told,
    write_models,
    write_partly,
    write_state_dicts,
)
from running import load, run

import weft
from weft.cli.app import main

if TYPE_CHECKING:
    from collections.abc import Mapping

GOLDEN = json.loads(Path(__file__).with_name(GOLDENS).read_text(encoding="utf-8"))


def compare(found: Mapping[str, Any], golden: Mapping[str, Any]) -> None:
    assert found.keys() == golden.keys()
    for name, expected in golden.items():
        if isinstance(expected, dict):
            compare(found[name], expected)
            continue
        difference = np.abs(np.array(found[name]) - expected).max()
        assert difference <= 2e-6 * max(expected[0], 1e-6), name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    return root


@pytest.mark.parametrize("name", WITH_TOKENIZERS)
def test_tokenizers_as_mergekit(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    found = run(models, WITH_TOKENIZERS[name], str(tmp_path / "out"))
    arrays = {key: value.numpy() for key, value in found.items()}
    compare(told(arrays, tmp_path / "out"), GOLDEN["with tokenizers"][name])
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = model.get_input_embeddings().weight
    assert model.config.vocab_size == len(rows) >= len(tokenizer)
    ids = tokenizer("<s> ab c abd </s>", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape == (1, ids.shape[1], len(rows))
    assert bool(logits.isfinite().all())


@pytest.fixture(scope="module")
def state_dicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("state-dicts")
    write_state_dicts(root)
    return root


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dicts_as_mergekit(
    name: str, state_dicts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit-pytorch's recipes, whatever the kind of file: one model.safetensors, no config."""
    monkeypatch.chdir(state_dicts)
    found = run(state_dicts, STATE_DICTS[name], str(tmp_path / "out"))
    arrays = {key: value.numpy() for key, value in found.items()}
    compare(told(arrays, tmp_path / "out"), GOLDEN["state dicts"][name])
    assert found["decoder.mask"].dtype == torch.bool
    assert int(found["encoder.down.0.block.1.norm.num_batches_tracked"]) == 17
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"model.safetensors", "mergekit_config.yml", "README.md", "weft.json"}


def test_counters_that_differ_are_said(state_dicts: Path, tmp_path: Path) -> None:
    other = torch.load(state_dicts / "c.pth")
    other["encoder.down.0.block.1.norm.num_batches_tracked"] += 1
    torch.save(other, tmp_path / "other.pth")
    text = (
        f"merge_method: linear\nmodels: [model: {state_dicts}/b.bin, model: {tmp_path}/other.pth]"
    )
    with pytest.raises(weft.WeftError, match="num_batches_tracked holds int64 and differs"):
        run(tmp_path, f"{text}\nparameters: {{weight: 1}}\n")


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("partly")
    write_partly(root)
    return root


@pytest.mark.parametrize("name", PARTLY)
def test_tensors_that_some_models_lack_as_mergekit(
    name: str, partly: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--tensor-union` and `--tensor-intersection` of mergekit-pytorch, and the notes."""
    monkeypatch.chdir(partly)
    option, text = PARTLY[name]
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["run", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "out"), option])
    assert not end.value.code
    found = {key: value.numpy() for key, value in load(tmp_path / "out").items()}
    compare(told(found, tmp_path / "out"), GOLDEN["partly"][name])
    notes = json.loads((tmp_path / "out/weft.json").read_text())["notes"]
    became = "made of the others" if option == "--tensor-union" else "left out"
    assert f"{became}: only_b.weight, which a.safetensors lacks" in notes
    assert f"{became}: only_a.weight, which b.bin lacks" in notes


def test_without_the_option_they_are_an_error(
    partly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(partly)
    (partly / "recipe.yml").write_text(PARTLY["union"][1])
    with pytest.raises(weft.WeftError) as error:
        weft.plan_run("recipe.yml")
    assert "b.bin has no only_a.weight, which a.safetensors has  @ models[1]" in str(error.value)
    assert "a.safetensors has no only_b.weight" in str(error.value)


_WITH = "models: [model: b.bin, model: c.pth]\n"
_SLERP = "merge_method: slerp\nparameters: {t: 1}\nbase_model: c.pth\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f"{_WITH}merge_method: ties\nbase_model: a.safetensors\nparameters: {{weight: 1}}\n",
            "the base a.safetensors has no only_b.weight, which others have",
        ),
        (
            "models: [model: a.safetensors]\n" + _SLERP,
            "slerp takes 1 model, and of those that have only_b.weight there are 0",
        ),
    ],
    ids=["no base", "too few"],
)
def test_what_no_method_can_make(
    text: str, said: str, partly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MergeKit ends here while it merges."""
    monkeypatch.chdir(partly)
    (partly / "recipe.yml").write_text(text)
    with pytest.raises(weft.WeftError) as error:
        weft.plan_run("recipe.yml", tensors="union")
    assert said in str(error.value)
    assert "--tensor-intersection leaves such tensors out" in str(error.value)
    weft.plan_run("recipe.yml", tensors="intersection")
