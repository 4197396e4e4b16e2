"""What is only compared is done while torch loads, and without it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pairs
import pytest
import torch
from pairs import extract
from safetensors.torch import load_file, save_file

from weft import native
from weft.core.errors import NumericsError

if TYPE_CHECKING:
    from pathlib import Path

LOOK = """
import json, sys, time
import weft.api.extract as api
from weft.execute import compared

def load():  # what would take a second
    begun = time.monotonic()
    while len(found) < {count} and time.monotonic() < begun + 20:
        time.sleep(0.01)
    seen.append((sorted(found), "torch" in sys.modules))

found, seen = [], []
real = compared.compared
def note(change, *rest):
    receipt = real(change, *rest)
    found.append(change.name)
    return receipt
compared.compared = note
api.load_torch = load
import weft
report = weft.extract("tuned", base="base", output="out", rank=4)
print(json.dumps(seen))
"""


@pytest.mark.skipif(native.library() is None, reason="loops are not compiled here")
def test_tensors_that_are_not_decomposed_need_no_torch(tmp_path: Path) -> None:
    moved = ("q_proj.weight", "input_layernorm.weight")
    pairs.pair(tmp_path, torch.bfloat16, moved=lambda name: name.endswith(moved))
    wanted = sorted(name for name, shape in pairs.names().items() if len(shape) == 1)
    found = subprocess.run(
        [sys.executable, "-c", LOOK.format(count=len(wanted))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout) == [[wanted, False]]
    saved = json.loads((tmp_path / "out" / "weft.json").read_text())["saved"]
    base, tuned = (load_file(tmp_path / x / "model.safetensors") for x in ("base", "tuned"))
    assert set(saved) == {f"model.layers.{n}.input_layernorm.weight" for n in range(2)}
    for name, said in saved.items():
        delta = tuned[name].double() - base[name].double()
        assert said["norm"] == pytest.approx(float(delta.norm()), rel=1e-6)


def test_a_tensor_that_is_compared_ahead_and_holds_nan(tmp_path: Path) -> None:
    pairs.pair(tmp_path, torch.bfloat16)
    path = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NumericsError, match=r"the tuned model\.norm\.weight holds NaN"):
        extract(tmp_path, rank=4)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))
