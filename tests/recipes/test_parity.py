"""Deterministic methods against the real MergeKit, whole models: within 1e-6 of every tensor.

The truth is what mergekit 0.1.5 wrote, kept as fingerprints (`make_parity_goldens.py`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

import weft
from tests.recipes.parity_models import fingerprint, write_adapter, write_all
from tests.recipes.parity_recipes import ELSEWHERE, METHODS, OTHERS, RECIPES

MERGEKIT = json.loads(Path(__file__).with_name("parity_goldens.json").read_text())
GOLDENS = MERGEKIT["recipes"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    write_all(root)
    return root


def run(root: Path, text: str, out: Path) -> dict[str, np.ndarray[Any, Any]]:
    (out.parent / "recipe.yml").write_text(re.sub(r"(model: |\+)(?=\w+-)", rf"\1{root}/", text))
    weft.run(out.parent / "recipe.yml", output=out)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    return found


def fused(found: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Mixtral's experts as MergeKit writes them: one tensor for all of a layer."""
    parts: dict[str, dict[tuple[int, str], np.ndarray[Any, Any]]] = {}
    made = {}
    for name, values in found.items():
        match = re.fullmatch(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w\d)\.weight", name)
        if match:
            parts.setdefault(match[1], {})[int(match[2]), match[3]] = values
        else:
            made[name.replace("block_sparse_moe.gate", "mlp.gate")] = values
    for layer, each in parts.items():
        count = len(each) // 3
        up = [np.concatenate([each[n, "w1"], each[n, "w3"]]) for n in range(count)]
        made[f"{layer}.mlp.experts.gate_up_proj"] = np.stack(up)
        made[f"{layer}.mlp.experts.down_proj"] = np.stack([each[n, "w2"] for n in range(count)])
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_equals_mergekit(name: str, models: Path, tmp_path: Path) -> None:
    found = run(models, RECIPES[name], tmp_path / "out")
    golden = GOLDENS[name]
    # MergeKit writes Mixtral's experts fused; Weft keeps the layout of the inputs.
    comparable = fused(found) if any("experts.gate_up_proj" in key for key in golden) else found
    assert set(comparable) == set(golden)
    for tensor, expected in golden.items():
        assert apart(comparable[tensor], expected) < 1e-6, tensor


def apart(values: np.ndarray[Any, Any], expected: list[float]) -> float:
    """How far a tensor is from the fingerprint of another, relative to that."""
    found = np.array(fingerprint(values))
    return float(np.abs(found - expected).max()) / max(expected[0], 1e-12)


def test_documents_equal_mergekit_multi(models: Path, tmp_path: Path) -> None:
    """In float32; what is in between goes to the disk there, and not here."""
    found = run(models, OTHERS["several"], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yml", "out"}
    golden = GOLDENS["several"]
    assert found.keys() == golden.keys()
    for tensor, expected in golden.items():
        assert apart(found[tensor], expected) < 1e-6, tensor


def test_sources_of_the_last_slice(models: Path, tmp_path: Path) -> None:
    """Norm and head are of all of them; MergeKit takes as many as the first slice has."""
    found = run(models, OTHERS["more in the last"], tmp_path / "out")
    golden = GOLDENS["more in the last"]
    b, c = (stored(models / f"llama-{name}") for name in "bc")
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.2.mlp.up_proj.weight"):
        mean = (b[name] + 3 * c[name]) / 4
        assert apart(found[name].astype(np.float64), fingerprint(mean)) < 1e-6
        theirs = mean if "layers" in name else b[name]
        assert apart(theirs, golden[name]) < 1e-6
    for name in golden.keys() - {"model.norm.weight", "lm_head.weight"}:
        assert apart(found[name], golden[name]) < 1e-6


def stored(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A model's tensors, in float64."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for file in folder.glob("*.safetensors"):
        found |= {name: value.double().numpy() for name, value in load_tensors(file).items()}
    return found


def test_every_method_is_compared_on_two_architectures() -> None:
    assert set(METHODS) <= {case for cases in ELSEWHERE.values() for case in cases}


def fusion(
    base: np.ndarray[Any, Any], other: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], float]:
    """The fused tensor, and how near to the threshold a score comes, relative to it."""

    def softmax(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        raised = np.exp(values - values.max(-1, keepdims=True))
        return np.asarray(raised / raised.sum(-1, keepdims=True) + 1e-8)

    p, q = softmax(other), softmax(base)
    score = np.abs(other - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(score, axis=None)
    low, middle, high = (ordered[k * (score.size - 1) // 4] for k in (1, 2, 3))
    threshold = middle + 1.5 * (high - low)
    margin = float(np.abs(score - threshold).min() / threshold)
    return np.where(score >= threshold, other, base), margin


@pytest.mark.parametrize("kind", ["llama", "gemma3vl"])
def test_fusion_but_for_the_last_bit_of_a_score(kind: str, models: Path, tmp_path: Path) -> None:
    """MergeKit's scores are float32, and one beside the threshold may fall on its other side."""
    name = f"{kind} arcee_fusion"
    found, golden = run(models, OTHERS[name], tmp_path / "out"), GOLDENS[name]
    base, other = (stored(models / f"{kind}-{letter}") for letter in ("base", "a"))
    assert found.keys() == golden.keys() == base.keys()
    differ, taken = [], []
    for tensor, expected in golden.items():
        truth, margin = fusion(base[tensor], other[tensor])
        assert apart(found[tensor], fingerprint(truth)) < 1e-6, tensor
        taken.append(float((truth != base[tensor]).mean()))
        if apart(truth, expected) > 1e-6:
            differ.append(tensor)
            assert margin < 1e-2, tensor
    assert len(differ) < 0.1 * len(golden)
    assert 0.002 < np.mean(taken) < 0.1


def test_what_is_lost_of_an_adapter(models: Path, tmp_path: Path) -> None:
    """MergeKit adds it to bfloat16 weights, and takes the difference: a third of it is noise.

    The truth is float64: W + 1000 · sBA, on whose scale the noise is seen.
    """
    name = "adapter on bfloat16"
    found, golden = run(models, OTHERS[name], tmp_path / "out"), GOLDENS[name]
    added = write_adapter(tmp_path / "again", rms=1e-4)
    base = stored(models / "llama-half-base")
    assert found.keys() == golden.keys() == base.keys()
    assert added.keys() < base.keys()
    for tensor, expected in golden.items():
        W, delta = base[tensor], added.get(tensor, np.zeros(1))
        assert apart(found[tensor], fingerprint(W + 1000 * delta)) < 1e-6, tensor
        sums = torch.from_numpy(W + delta).bfloat16().double().numpy()
        assert apart(W + 1000 * (sums - W), expected) < 1e-6, tensor
        if tensor in added:
            assert apart(W + 1000 * delta, expected) > 0.1, tensor
            noise = np.linalg.norm(sums - W - delta) / np.linalg.norm(delta)
            assert 0.2 < noise < 0.5, tensor


def test_tied_base_and_untied_fine_tune(models: Path, tmp_path: Path) -> None:
    """Both merge the head. MergeKit's config goes on to say that it is not used, and it is not."""
    found, golden = run(models, OTHERS["tied base"], tmp_path / "out"), GOLDENS["tied base"]
    base, tuned = (stored(models / f"llama-{name}") for name in ("tied-base", "a"))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    base[head] = base[embedding]
    truth = {name: 0.75 * base[name] + 0.25 * value for name, value in tuned.items()}
    assert found.keys() == golden.keys() == truth.keys()
    for tensor, expected in golden.items():
        assert apart(found[tensor], fingerprint(truth[tensor])) < 1e-6, tensor
        assert apart(truth[tensor], expected) < 1e-6, tensor
    assert apart(truth[embedding], fingerprint(truth[head])) > 0.1
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert MERGEKIT["configs"]["tied base"]["tie_word_embeddings"] is True


def test_experts_are_merged_each_for_itself(models: Path, tmp_path: Path) -> None:
    """MergeKit fuses those of a layer first: one angle for all of them, in place of one for each.

    The truth of both is float64.
    """
    found = run(models, OTHERS["mixtral slerp, fused"], tmp_path / "out")
    golden = GOLDENS["mixtral slerp, fused"]
    base, other = (stored(models / f"mixtral-{name}") for name in ("base", "a"))
    each = {name: slerp(base[name], other[name], 0.3) for name in base}
    together = {name: slerp(value, fused(other)[name], 0.3) for name, value in fused(base).items()}
    assert found.keys() == each.keys()
    assert golden.keys() == together.keys()
    for name, value in found.items():
        assert apart(value.astype(np.float64), fingerprint(each[name])) < 1e-6, name
    for name, expected in golden.items():
        assert apart(together[name], expected) < 1e-6, name
        differs = apart(fused(each)[name], expected) > 1e-5
        assert differs == ("experts" in name), name


def slerp(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], t: float) -> np.ndarray[Any, Any]:
    cosine = (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * other
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * one + np.sin(t * theta) * other) / np.sin(theta)


def test_rows_that_nearly_cancel(models: Path, tmp_path: Path) -> None:
    """Some task vectors of 4 numbers are nearly opposite: 1 + cos θ is all rounding then."""
    name = "gemma3vl model_stock_rows"
    found, golden = run(models, OTHERS[name], tmp_path / "out"), GOLDENS[name]
    a, b, base = (stored(models / f"gemma3vl-{letter}") for letter in ("a", "b", "base"))
    assert found.keys() == golden.keys() == base.keys()
    off = {}
    for tensor, expected in golden.items():
        W = base[tensor].reshape(-1, base[tensor].shape[-1])
        x, y = (each[tensor].reshape(W.shape) - W for each in (a, b))
        cosine = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
        share = 2 * cosine / (1 + cosine)
        truth = fingerprint((W + share[:, None] * (x + y) / 2).reshape(base[tensor].shape))
        assert apart(found[tensor], truth) < 2e-7, tensor
        off[tensor] = apart(np.asarray(found[tensor]), expected)
        if np.abs(share).max() < 50:
            assert off[tensor] < 1e-6, tensor
    assert 1e-6 < max(off.values()) < 3e-6  # MergeKit's own
