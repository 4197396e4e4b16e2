"""What does not change is copied while torch loads: nothing before that may need it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import weft
from weft.core import events
from weft.core.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 64
# Says for the first bytes that are written whether torch was there.
FIRST_BYTES = """
import sys, threading, weft
from weft.core import events
loaded, seen = [], threading.Event()
class Wait:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            seen.wait(30)
def note(event):
    if isinstance(event, events.Moved):
        loaded.append("torch" in sys.modules)
        seen.set()
sys.meta_path.insert(0, Wait())
weft.merge("base", "adapter", output="out", on_event=note)
print(loaded[0])
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of two layers, and a LoRA of the first."""
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    names = ("model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight")
    save_file({name: torch.randn(WIDTH, WIDTH) for name in names}, "base/model.safetensors")
    (tmp_path / "base/config.json").write_text("{}")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    save_adapter(torch.randn(2, WIDTH))
    return tmp_path


def save_adapter(A: torch.Tensor) -> None:
    key = "base_model.model.model.layers.0.q_proj.lora_{}.weight"
    factors = {key.format("A"): A, key.format("B"): torch.randn(WIDTH, 2)}
    save_file(factors, "adapter/adapter_model.safetensors")


def test_copies_do_not_wait_for_torch(here: Path) -> None:
    """Torch's own import is held up until the first bytes are out."""
    command = [sys.executable, "-c", FIRST_BYTES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False"], done.stderr
    assert (here / "out/model.safetensors").exists()


@pytest.mark.parametrize("force", [False, True])
def test_an_adapter_that_turns_out_unusable_leaves_nothing(here: Path, force: bool) -> None:
    """Its numbers are looked at when the output is begun already; an old output stays."""
    if force:
        weft.merge("base", "adapter", output="out")
    before = {path: path.read_bytes() for path in (here / "out").glob("*")}
    save_adapter(torch.full((2, WIDTH), torch.nan))
    begun = []
    with pytest.raises(PlanError, match="NaN or infinite"):
        weft.merge("base", "adapter", output="out", force=force, on_event=begun.append)
    assert any(isinstance(event, events.Started) for event in begun)
    assert {path: path.read_bytes() for path in (here / "out").glob("*")} == before
    assert not (here / "out.partial").exists()
