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
from tests.recipes.parity_recipes import RECIPES

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
        norm = max(expected[0], 1e-12)
        difference = np.abs(np.array(fingerprint(comparable[tensor])) - expected).max()
        assert difference / norm < 1e-6, tensor
