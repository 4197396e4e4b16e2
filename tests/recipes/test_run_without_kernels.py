"""Where nothing could be compiled, torch does the same: whole runs, of weights in every dtype."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from running import MATRIX, checkpoint, llama, load, lora, run
from safetensors.torch import save_file

import weft
from weft import native
from weft.execute._blocks import Workspace

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

EACH = {
    "linear": "weight: 0.5",
    "task_arithmetic": "weight: 0.5",
    "ties": "{weight: 0.5, density: 0.4}",
    "breadcrumbs_ties": "{weight: 0.5, density: 0.6, gamma: 0.1}",
    "breadcrumbs": "{weight: 0.5, density: 0.6, gamma: 0.1}",
    "dare_ties": "{weight: 0.5, density: 0.4}",
    "dare_linear": "{weight: 0.5, density: 0.4}",
    "della": "{weight: 0.5, density: 0.4}",
    "della_linear": "{weight: 0.5, density: 0.4}",
    "model_stock": "{}",
    "karcher": "{}",
    "multislerp": "weight: 0.5",
    "nuslerp": "weight: 0.5",
    "sce": "{}",
    "nearswap": None,
    "slerp": None,
}
BASELESS = ("linear", "karcher")
SHARED = {"nearswap": "t: 0.002", "slerp": "t: 0.4"}


def recipe(method: str, one: str, other: str) -> str:
    each = EACH[method]
    lines = [f"merge_method: {method}", "dtype: float32"]
    if method not in BASELESS:
        lines.append("base_model: base")
    if method in SHARED:
        lines.append(f"parameters: {{{SHARED[method]}}}")
    lines.append("models:")
    if method in SHARED:
        lines += ["  - model: base", f"  - model: {one}"]
    else:
        each = each if each and each.startswith("{") else f"{{{each}}}"
        lines += [f"  - {{model: {name}, parameters: {each}}}" for name in (one, other)]
    return "\n".join(lines)


def both(
    root: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """The tensors and the manifest, with compiled loops and without."""
    found = []
    for out in ("compiled", "torch"):
        if out == "torch":
            monkeypatch.setattr(native, "library", lambda: None)
        tensors = run(root, text, out)
        found.append((tensors, json.loads((root / out / "weft.json").read_text())))
    return found


@pytest.mark.skipif(native.library() is None, reason="nothing was compiled")
@pytest.mark.parametrize("models", ["one two", "base+adapter two"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", EACH)
def test_the_same_model(
    method: str, dtype: str, models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("base", "one", "two")):
        checkpoint(tmp_path / name, llama(number or None, dtype=dtype))
    lora(tmp_path / "adapter", 5, rms=3e-3)
    monkeypatch.chdir(tmp_path)
    (ours, said), (theirs, says) = both(tmp_path, monkeypatch, recipe(method, *models.split()))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, theirs[name], rtol=1e-5, atol=2e-8), name
    for key in ("survival", "changed"):
        one, other = said["totals"].get(key), says["totals"].get(key)
        assert one == other or one == pytest.approx(other, rel=1e-4), key


@pytest.mark.skipif(native.library() is None, reason="nothing was compiled")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_same_merge(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: both add W and ΔW in float32, and round once."""
    checkpoint(tmp_path / "base", llama(dtype=dtype))
    lora(tmp_path / "adapter", 5, rms=3e-3)
    found = []
    for out in ("compiled", "torch"):
        if out == "torch":
            monkeypatch.setattr(native, "library", lambda: None)
        report = weft.merge(tmp_path / "base", [tmp_path / "adapter"], output=tmp_path / out)
        found.append((load(tmp_path / out), report.totals.survival))
    (ours, survival), (theirs, other) = found
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert survival == pytest.approx(other, rel=1e-5)


@pytest.mark.skipif(native.library() is None, reason="nothing was compiled")
def test_a_run_is_not_resumed_by_other_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their last digits may differ, and an output is one's work."""
    from weft.api import _execution

    assert _execution.setting("cpu").endswith(", compiled loops")
    monkeypatch.setattr(native, "library", lambda: None)
    assert _execution.setting("cpu").endswith(", plain loops")


@pytest.mark.parametrize("models", ["base+adapter base+dora", "base base+adapter"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_weights_that_several_models_stand_on_are_read_once(
    method: str, models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are stored or widened, whoever asks first."""
    checkpoint(tmp_path / "base", llama())
    lora(tmp_path / "adapter", 5, rms=3e-3)
    lora(tmp_path / "dora", 6, rms=3e-3)
    factors = load(tmp_path / "dora")
    for key in [key for key in factors if "lora_A" in key]:
        weight = llama()[f"{key.partition('.lora_A')[0].removeprefix('base_model.model.')}.weight"]
        magnitude = key.replace("lora_A.weight", "lora_magnitude_vector")
        factors[magnitude] = weight.float().norm(dim=1)
    save_file(factors, tmp_path / "dora" / "adapter_model.safetensors", {"format": "pt"})
    config = tmp_path / "dora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    reads: list[str] = []
    real = Workspace.read

    def read(self: Workspace, files: Any, ref: Any, *rest: Any) -> native.Numbers:
        if ref.name == f"{MATRIX.format(0)}.weight":
            reads.append(ref.name)
        return real(self, files, ref, *rest)

    monkeypatch.setattr(Workspace, "read", read)
    monkeypatch.chdir(tmp_path)
    run(tmp_path, recipe(method, *models.split()))
    assert len(reads) == 1
