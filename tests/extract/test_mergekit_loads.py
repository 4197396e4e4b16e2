"""What `weft extract` writes, loaded by MergeKit as `base+ADAPTER`: the model that Weft merges.

The truth is what mergekit 0.1.5 wrote, kept as fingerprints (`make_mergekit_goldens.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.extract.mergekit_cases import CASES, form_of
from tests.recipes.parity_models import fingerprint, write_all
from weft.cli.app import main

TRUTH = json.loads(Path(__file__).with_name("mergekit_goldens.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_all(root)
    return root


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert not end.value.code


@pytest.mark.parametrize("name", CASES)
def test_mergekit_has_the_merged_model(name: str, models: Path, tmp_path: Path) -> None:
    base, tuned, options = CASES[name]
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    run("extract", models / tuned, "--base", models / base, "-o", adapter, "-q", *options)
    run("merge", models / base, adapter, "-o", out, "-q")
    assert form_of(adapter) == TRUTH["adapters"][name]  # what MergeKit was given, to the key
    found = load_file(out / "model.safetensors")
    golden = TRUTH["cases"][name]
    head = "lm_head.weight"
    if head not in found:  # PEFT's copy of a saved tied table; the same as the embedding
        assert golden.pop(head, None) in (None, golden["model.embed_tokens.weight"])
    assert set(found) == set(golden)
    before = load_file(models / base / "model.safetensors")
    for tensor, expected in golden.items():
        off = np.abs(np.array(fingerprint(found[tensor])) - expected).max()
        assert off < 1e-5 * expected[0], tensor
    # The whole of the change is there, and not the base again.
    moved = [n for n in before if not np.array_equal(before[n], found[n])]
    assert len(moved) > 20
