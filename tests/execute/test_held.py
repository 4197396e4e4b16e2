"""What a method goes over several times is read once, where it is not too large to be kept."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

import weft
from weft import native
from weft.execute import _held
from weft.execute._files import Files
from weft.formats.safetensors import read_header

if TYPE_CHECKING:
    from pathlib import Path

from safetensors.torch import load_file, save_file

SHAPES = {
    "one": (1500, 1024),
    "two": (700, 512),
    "three": (333,),
    "none": (4, 0),
    "four": (60, 999),
}
RECIPE = """\
merge_method: {method}
base_model: base
parameters: {{weight: 0.5, density: 0.4}}
models: [model: a, model: b]
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"{key}.weight": torch.randn(shape, generator=generator).bfloat16()
            for key, shape in SHAPES.items()
        }
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes of weights that are read, by the model's name."""
    found: Counter[str] = Counter()
    real = Files.read

    def read(self: Files, file: str, offset: int, into: memoryview) -> None:
        found[file.rsplit("/", 2)[-2]] += len(into)
        real(self, file, offset, into)

    monkeypatch.setattr(Files, "read", read)
    return found


def merged(root: Path, method: str, out: str, **options: Any) -> dict[str, torch.Tensor]:
    (root / "recipe.yml").write_text(RECIPE.format(method=method))
    weft.run(root / "recipe.yml", output=root / out, **options)
    return load_file(root / out / "model.safetensors")


@pytest.mark.skipif(native.library() is None, reason="nothing was compiled")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "model_stock", "sce"])
def test_each_byte_is_read_once(
    method: str, threads: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method in ("model_stock", "sce"):
        monkeypatch.setitem(globals(), "RECIPE", RECIPE.replace("weight: 0.5, density: 0.4", ""))
    seen = counted(monkeypatch)
    kept = merged(root, method, "kept", threads=threads)
    whole = sum(ref.nbytes for ref in read_header(root / "a" / "model.safetensors").tensors)
    # Of a sample, rows of which a block is read afterwards come twice.
    assert all(whole <= seen[name] <= 1.05 * whole for name in ("base", "a", "b"))
    monkeypatch.setattr(_held, "MOST", 0)
    seen.clear()
    again = merged(root, method, "again", threads=threads)
    assert seen["a"] > 1.5 * whole
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


def test_memory_is_used_again() -> None:
    pool = _held.Pool()
    first = pool.take(10_000)
    pool.give(first)
    assert pool.take(9_000).address == first.address
    pool.give(first)
    larger = pool.take(20_000)
    pool.give(larger)
    assert pool.take(10_000).address == larger.address  # the smaller one is gone
