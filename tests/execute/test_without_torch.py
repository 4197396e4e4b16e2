"""What compiled loops do needs no torch, which takes a second to load."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from weft import native

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(native.library() is None, reason="nothing was compiled")

# An odd number of rows, a vector, and more elements than a strip has.
SHAPES = {"one": (333, 64), "two": (77,), "three": (4201, 1024)}
RUN = """\
import sys
from weft.cli.app import main
try:
    main(["run", "recipe.yml", "-o", "out", *sys.argv[1:]])
finally:
    print("torch" if "torch" in sys.modules else "no torch")
"""
PLAIN = {
    "linear": (
        "models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 1}}]"
    ),
    "slerp": "base_model: a\nmodels: [model: a, model: b]\nparameters: {t: 0.3}",
    "multislerp": (
        "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2}}]"
    ),
    "karcher": "models: [model: a, model: b, model: base]",
    "task_arithmetic": "base_model: base\nmodels: [model: a, model: b]\nparameters: {weight: 0.4}",
    "model_stock": "base_model: base\nmodels: [model: a, model: b]",
    "dare_ties": (
        "base_model: base\nmodels: [model: a, model: b]\nparameters: {weight: 0.5, density: 0.4}"
    ),
    "dare_linear": (
        "base_model: base\nmodels: [model: a, model: b]\nparameters: {weight: 0.5, density: 1}"
    ),
    "passthrough": "models: [{model: a, parameters: {scale: 0.5}}]",
}
OTHERS = {
    "model_stock": PLAIN["model_stock"] + "\nparameters: {filter_wise: true}",
    "dare_ties": PLAIN["dare_ties"].replace("density: 0.4", "density: 0"),
    "nuslerp": PLAIN["multislerp"],
    "linear": PLAIN["linear"] + "\ndtype: float64",
}


# Torch that takes two seconds more, and is seen to load from the first moment on.
SLOW = """\
import sys, time
import weft
from weft.api import _execution
load = _execution.load_torch

def slow():
    sys.modules["torch"] = type(sys)("torch")  # has nothing yet
    time.sleep(2)
    del sys.modules["torch"]
    load()
    print("loaded", flush=True)

_execution.load_torch = slow
from weft.write.checkpoint import CheckpointSink
real = CheckpointSink.finish

def finish(self, receipts):
    print(*(each.name for each in sorted(receipts, key=lambda each: each.name)), flush=True)
    real(self, receipts)

CheckpointSink.finish = finish
weft.run("recipe.yml", output="out", threads=1)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"{key}.weight": torch.randn(shape, generator=generator).to(dtype)
            for (key, shape), dtype in zip(
                SHAPES.items(), (torch.bfloat16, torch.float32, torch.float16), strict=True
            )
        }
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(root: Path, method: str, rest: str) -> subprocess.CompletedProcess[str]:
    (root / "recipe.yml").write_text(f"merge_method: {method}\n{rest}\n")
    command = [sys.executable, "-c", RUN]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("method", PLAIN)
def test_torch_is_not_loaded(method: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(root, method, PLAIN[method])
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("no torch\n")
    found = load_file(root / "out" / "model.safetensors")
    # What torch makes of it, without loops.
    monkeypatch.setattr(native, "library", lambda: None)
    weft.run("recipe.yml", output="plain")
    for name, expected in load_file(root / "plain" / "model.safetensors").items():
        # Sums in another order, and so one more ulp here and there.
        ulp = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(found[name], expected, rtol=ulp, atol=1e-6)


@pytest.mark.parametrize("method", OTHERS)
def test_it_is_loaded_before_anything_is_computed_where_it_is_needed(
    method: str, root: Path
) -> None:
    done = run(root, method, OTHERS[method])
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\ntorch\n")


def test_infinity_is_found_out_by_torch_that_comes_late(root: Path) -> None:
    tensors = load_file(root / "a" / "model.safetensors")
    tensors["three.weight"][17, 5] = torch.inf
    save_file(tensors, root / "a" / "model.safetensors", {"format": "pt"})
    done = run(root, "model_stock", PLAIN["model_stock"])
    assert done.returncode != 0
    assert "three.weight" in done.stderr
    assert "NaN or infinity" in done.stderr
    assert done.stdout.endswith("torch\n")
    assert not done.stdout.endswith("no torch\n")
    assert not (root / "out").exists()


# ------------------------------------------------------------------- some jobs need it, some not

LORA = "models: [{model: base+lora, parameters: {weight: 1}}, {model: a, parameters: {weight: 1}}]"


def adapter(root: Path, value: float = 1e-2) -> None:
    """For `three` alone."""
    (root / "lora").mkdir()
    rows, columns = SHAPES["three"]
    factors = {"A": torch.full((4, columns), value), "B": torch.full((rows, 4), 1e-2)}
    save_file(
        {f"base_model.model.three.lora_{name}.weight": each for name, each in factors.items()},
        root / "lora" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["three"]}
    (root / "lora" / "adapter_config.json").write_text(json.dumps(config))


def test_jobs_that_need_none_are_done_while_it_loads(root: Path) -> None:
    adapter(root)
    done = run(root, "linear", LORA)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\ntorch\n")
    found = load_file(root / "out" / "model.safetensors")
    base, other = (load_file(root / name / "model.safetensors") for name in ("base", "a"))
    for name, value in found.items():
        one = base[name].double() + (4e-4 if name.startswith("three") else 0)
        expected = (one + other[name].double()) / 2
        torch.testing.assert_close(
            value.double(), expected, rtol=2 * torch.finfo(value.dtype).eps, atol=1e-4
        )


def test_jobs_that_need_none_do_not_wait_for_it(root: Path) -> None:
    """What is loading is in `sys.modules` already; who asked it for anything would wait."""
    adapter(root)
    (root / "recipe.yml").write_text(f"merge_method: linear\n{LORA}\n")
    done = subprocess.run(
        [sys.executable, "-c", SLOW], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *first, loaded, last = done.stdout.split()
    assert (sorted(first), loaded, last) == (["one.weight", "two.weight"], "loaded", "three.weight")


def test_what_goes_wrong_meanwhile_stops_it(root: Path) -> None:
    adapter(root)
    tensors = load_file(root / "a" / "model.safetensors")
    tensors["one.weight"][17, 5] = torch.nan
    save_file(tensors, root / "a" / "model.safetensors", {"format": "pt"})
    done = run(root, "linear", LORA)
    assert "one.weight" in done.stderr
    assert "NaN or infinity" in done.stderr
    assert not list(root.glob("out*"))


def test_an_adapter_that_forbids_the_run_stops_what_goes_on_meanwhile(root: Path) -> None:
    adapter(root, math.nan)
    done = run(root, "linear", LORA)
    assert "NaN or infinite" in done.stderr
    assert not list(root.glob("out*"))
