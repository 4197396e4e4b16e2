"""The same merge with the arithmetic on a GPU: against float64, and against the CPU's bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# More than one block, with a last one that is not full; a Conv1D-shaped one; one that is copied.
SHAPES = {"layers.0.up": (9001, 4096), "layers.0.down": (1024, 700), "layers.0.norm": (4096,)}
RANK, ALPHA = 16, 24  # a scaling that is no power of two


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "adapter").mkdir()
    torch.manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape) / 50 for name, shape in SHAPES.items()}
    factors = {}
    for name, (rows, *columns) in SHAPES.items():
        if columns:
            key = f"base_model.model.{name}"
            factors[f"{key}.lora_A.weight"] = torch.randn(RANK, *columns) / 50
            factors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK) / 50
    save_file({n: w.bfloat16() for n, w in weights.items()}, folder / "model.safetensors")
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    write_config(folder, use_dora=False)
    return folder


def write_config(folder: Path, **more: object) -> None:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **more}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def merged(model: Path, out: Path, device: str, **options: object) -> dict[str, Tensor]:
    weft.merge(model, model / "adapter", output=out, device=device, threads=3, **options)  # type: ignore[arg-type]
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
def test_against_float64(model: Path, tmp_path: Path, dtype: str | None) -> None:
    result = merged(model, tmp_path / "out", "cuda", dtype=dtype)
    base = load_file(model / "model.safetensors")
    factors = load_file(model / "adapter" / "adapter_model.safetensors")
    for name, weight in base.items():
        key = "base_model.model." + name.removesuffix(".weight")
        exact = weight.double()
        if weight.ndim == 2:
            A, B = (factors[f"{key}.lora_{half}.weight"].double() for half in "AB")
            exact = exact + ALPHA / RANK * B @ A
        written = result[name]
        wrong = written != exact.to(written.dtype)
        if dtype == "float32":
            assert (written.double() - exact).abs().max() < 1e-6
        else:
            assert wrong.float().mean() <= 1e-4
            assert (written.double() - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_same_bytes_as_on_the_cpu_but_for_the_last_bit(model: Path, tmp_path: Path) -> None:
    one, other = (merged(model, tmp_path / d, d) for d in ("cpu", "cuda"))
    assert torch.equal(one["layers.0.norm.weight"], other["layers.0.norm.weight"])
    for name, values in one.items():
        assert (values != other[name]).float().mean() <= 1e-4


def test_twice_the_same(model: Path, tmp_path: Path) -> None:
    for n, threads in enumerate((1, 4)):
        weft.merge(
            model, model / "adapter", output=tmp_path / str(n), device="cuda:0", threads=threads
        )
    files = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(2)]
    assert files[0] == files[1]


def test_dora(model: Path, tmp_path: Path) -> None:
    """Row norms are taken over blocks of several threads' streams."""
    factors = load_file(model / "adapter" / "adapter_model.safetensors")
    original = dict(factors)
    for name in ("layers.0.up", "layers.0.down"):
        key = f"base_model.model.{name}.lora_magnitude_vector.weight"
        factors[key] = torch.rand(SHAPES[name][0]) + 1
    try:
        save_file(factors, model / "adapter" / "adapter_model.safetensors")
        write_config(model, use_dora=True)
        one, other = (merged(model, tmp_path / d, d) for d in ("cpu", "cuda"))
    finally:
        save_file(original, model / "adapter" / "adapter_model.safetensors")
        write_config(model, use_dora=False)
    for name, values in one.items():
        assert (values != other[name]).float().mean() <= 1e-3


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two models tuned from it, of the shapes above."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(1)
    base = {f"{name}.weight": torch.randn(shape) / 50 for name, shape in SHAPES.items()}
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        size = 0.0 if name == "base" else 0.004
        tensors = {key: (w + size * torch.randn(w.shape)).bfloat16() for key, w in base.items()}
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
def test_recipes(method: str, tuned: Path, tmp_path: Path) -> None:
    """What is dropped follows from the seed and from exact comparisons, wherever that is done.

    Sums over a tensor are added in another order, so that a last bit may differ.
    """
    text = f"merge_method: {method}\nbase_model: {tuned}/base\nout_dtype: float32\nmodels:\n"
    for name, weight in (("a", 0.7), ("b", 0.4)):
        settings = f"{{weight: {weight}, density: 0.4}}"
        text += f"  - {{model: {tuned}/{name}, parameters: {settings}}}\n"
    (tmp_path / "recipe.yml").write_text(text)
    results = []
    for device in ("cpu", "cuda"):
        weft.run(tmp_path / "recipe.yml", output=tmp_path / device, device=device, threads=3)
        results.append(load_file(tmp_path / device / "model.safetensors"))
    base = load_file(tuned / "base" / "model.safetensors")
    for name, value in results[0].items():
        change = value - base[name].float()
        assert 0.3 < (change == 0).float().mean() < 0.7
        off = (value - results[1][name]).abs() > 1e-5 * change.abs().max()
        assert off.float().mean() <= 1e-5
