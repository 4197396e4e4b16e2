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
from safetensors.numpy import load_file

import weft
from tests.recipes.parity_models import fingerprint, write_all
from tests.recipes.parity_recipes import OTHERS, RECIPES

GOLDENS = json.loads(Path(__file__).with_name("parity_goldens.json").read_text())["recipes"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    write_all(root)
    return root


def run(root: Path, text: str, out: Path) -> dict[str, np.ndarray[Any, Any]]:
    (out.parent / "recipe.yml").write_text(re.sub(r"(model: )(?=\w+-)", rf"\1{root}/", text))
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


def test_experts_are_merged_each_for_itself(models: Path, tmp_path: Path) -> None:
    """MergeKit fuses those of a layer first: one angle for all of them, in place of one for each.

    The truth of both is float64.
    """
    found = run(models, OTHERS["mixtral slerp, fused"], tmp_path / "out")
    golden = GOLDENS["mixtral slerp, fused"]
    inputs: list[dict[str, np.ndarray[Any, Any]]] = []
    for name in ("base", "a"):
        inputs.append({})
        for file in (models / f"mixtral-{name}").glob("*.safetensors"):
            inputs[-1] |= {k: v.astype(np.float64) for k, v in load_file(file).items()}
    base, other = inputs
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
