"""A recipe of three models, killed, starved or cut otherwise: the same bytes, or no output."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_robustness import (
    JOURNAL,
    Nursery,
    differences,
    looks_like_a_model,
    nursery,
    partial_of,
)

import weft
from weft.core import blocks

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["nursery"]  # the fixture
SETTINGS = {
    "ties": "weight: 0.5, density: 0.4",
    "dare_ties": "weight: 0.5, density: 0.4",
    "della": "weight: 0.5, density: 0.4",
}


def make(folder: Path, layers: int, width: int) -> Path:
    """A base, three fine-tunes in bfloat16, two shards each, and a recipe for each method."""
    for number, name in enumerate(("base", "a", "b", "c")):
        model = folder / name
        model.mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        shared = torch.Generator().manual_seed(99)
        tensors = {}
        for n in range(layers):
            shapes = {"proj.weight": (width, width), "norm.weight": (width,)}
            for part, shape in (shapes | {"experts.weight": (3, 20, 16)}).items():
                values = torch.randn(shape, generator=shared)
                change = torch.randn(shape, generator=generator)
                tensors[f"layers.{n}.{part}"] = (values + 0.1 * number * change).bfloat16()
        names = list(tensors)
        weight_map = {}
        for k, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
            file = f"model-{k:05}-of-00002.safetensors"
            save_file({x: tensors[x] for x in part}, model / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (model / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
        (model / "tokenizer.json").write_text('{"model": {}}')
    for method, settings in SETTINGS.items():
        lines = [f"  - {{model: {folder}/{x}, parameters: {{{settings}}}}}" for x in "abc"]
        text = "\n".join([f"merge_method: {method}\nbase_model: {folder}/base\nmodels:", *lines])
        (folder / f"{method}.yml").write_text(text)
    return folder


def command(models: Path, out: Path, *more: str, method: str = "ties") -> list[str | Path]:
    return ["run", models / f"{method}.yml", "-o", out, "--quiet", *more]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small"), layers=4, width=96)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MB each: it takes a moment."""
    return make(tmp_path_factory.mktemp("large"), layers=10, width=1400)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_killed_at_random_moments(
    method: str, large: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """Each kill is of the run that goes on from the one before."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    begin = time.perf_counter()
    assert nursery.run(command(large, whole, method=method)) == 0, nursery.stderr
    length = time.perf_counter() - begin
    rng = random.Random(7)
    killed = receipts = 0
    for _ in range(6):
        more = ["--resume"] if partial_of(out).exists() else []
        nursery.begin(command(large, out, *more, method=method))
        time.sleep(length * (0.3 + 0.4 * rng.random()))  # a third of it loads torch
        nursery.kill()
        if nursery.end() == 0 or out.exists():
            assert differences(out, whole) == []
            shutil.rmtree(out)
            continue
        killed += 1
        journal = partial_of(out) / JOURNAL
        receipts += journal.exists() and journal.read_text().count("\n") > 1
        assert not looks_like_a_model(partial_of(out))
    assert killed >= 2
    assert receipts >= 1, "no run was killed in the midst of its work"
    more = ["--resume"] if partial_of(out).exists() else []
    assert nursery.run(command(large, out, *more, method=method)) == 0, nursery.stderr
    assert differences(out, whole) == []


# Kills the process when so many blocks have been written.
KILL = """
import os, signal
real, seen = os.pwrite, 0
def pwrite(handle, data, offset):
    global seen
    seen += 1
    if seen == {after}:
        {what}
    return real(handle, data, offset)
os.pwrite = pwrite
"""


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("after", [3, 6])
def test_killed_and_resumed(
    method: str, after: int, small: Path, nursery: Nursery, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert nursery.run(command(small, whole, method=method)) == 0, nursery.stderr
    kill = KILL.format(after=after, what="os.kill(os.getpid(), signal.SIGKILL)")
    assert nursery.run(command(small, out, "--threads", "1", method=method), kill) == -9
    assert not out.exists()
    assert nursery.run(command(small, out, "--resume", method=method)) == 0, nursery.stderr
    assert differences(out, whole) == []


def test_disk_full(small: Path, nursery: Nursery, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert nursery.run(command(small, whole)) == 0, nursery.stderr
    full = KILL.format(after=4, what=f"raise OSError({errno.ENOSPC}, 'No space left on device')")
    assert nursery.run(command(small, out), full) == 2
    assert "the disk is full" in nursery.stderr
    assert "Traceback" not in nursery.stderr
    assert not out.exists()
    assert nursery.run(command(small, out, "--resume")) == 0, nursery.stderr
    assert differences(out, whole) == []


def _cut(models: Path) -> None:
    shard = models / "b/model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)


def _gone(models: Path) -> None:
    (models / "c/model-00001-of-00002.safetensors").unlink()


def _garbled(models: Path) -> None:
    shard = models / "a/model-00001-of-00002.safetensors"
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])


def _no_config(models: Path) -> None:
    (models / "base/config.json").write_text("{")


def _not_a_number(models: Path) -> None:
    shard = models / "c/model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["layers.3.proj.weight"][95, 95] = float("nan")
    save_file(tensors, shard, {"format": "pt"})


BAD = {
    "a shard cut off": (_cut, "b/model-00002-of-00002.safetensors"),
    "a shard that is not there": (_gone, "c lacks model-00001-of-00002.safetensors"),
    "a header of noise": (_garbled, "a/model-00001-of-00002.safetensors"),
    "half a config": (_no_config, "base/config.json"),
    "not a number": (_not_a_number, "layers.3.proj.weight in"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, small: Path, tmp_path: Path) -> None:
    """Nothing is left that looks like a model, and the file is named."""
    models, out = tmp_path / "models", tmp_path / "out"
    shutil.copytree(small, models)
    recipe = models / "ties.yml"
    recipe.write_text(recipe.read_text().replace(str(small), str(models)))
    spoil, named = BAD[what]
    spoil(models)
    with pytest.raises(weft.WeftError) as error:
        weft.run(recipe, output=out)
    assert named in str(error.value)
    assert error.value.hint or "\n      " in str(error.value)  # what to do next
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_an_output_that_is_there(small: Path, tmp_path: Path) -> None:
    """It is kept, unless --force replaces it; then by a whole model."""
    for method in ("dare_ties", "ties"):
        weft.run(small / f"{method}.yml", output=tmp_path / method)
    before = _files(tmp_path / "dare_ties")
    with pytest.raises(weft.WeftError, match="dare_ties"):
        weft.run(small / "ties.yml", output=tmp_path / "dare_ties")
    assert _files(tmp_path / "dare_ties") == before
    weft.run(small / "ties.yml", output=tmp_path / "dare_ties", force=True)
    assert _files(tmp_path / "dare_ties") == _files(tmp_path / "ties")


@pytest.mark.parametrize("other", ["seed", "recipe"])
def test_another_run_is_not_resumed(
    other: str, small: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """What was drawn with another seed, or merged otherwise, is none of this output."""
    models, out, whole = tmp_path / "models", tmp_path / "out", tmp_path / "whole"
    shutil.copytree(small, models)
    text = (models / "dare_ties.yml").read_text().replace(str(small), str(models))
    (models / "dare_ties.yml").write_text(text)
    kill = KILL.format(after=5, what="os.kill(os.getpid(), signal.SIGKILL)")
    first = command(models, out, "--threads", "1", method="dare_ties")
    assert nursery.run(first, kill) == -9
    if other == "recipe":
        (models / "dare_ties.yml").write_text(text.replace("density: 0.4", "density: 0.5", 1))
    more = ["--seed", "1"] if other == "seed" else []
    assert nursery.run(command(models, whole, *more, method="dare_ties")) == 0
    code = nursery.run(command(models, out, "--resume", *more, method="dare_ties"))
    assert code == 2, nursery.stderr
    assert "--force" in nursery.stderr
    assert nursery.run(command(models, out, "--force", *more, method="dare_ties")) == 0
    assert differences(out, whole) == []


@pytest.mark.parametrize("method", SETTINGS)
def test_threads_change_no_bit(
    method: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tensors in several strips, which threads share."""
    monkeypatch.setitem(blocks.STRIP, "cpu", 2000)
    monkeypatch.setitem(blocks.BLOCK, "cpu", 500)
    for threads in (1, 2, 5):
        weft.run(small / f"{method}.yml", output=tmp_path / str(threads), threads=threads)
    for threads in (2, 5):
        assert _files(tmp_path / str(threads)) == _files(tmp_path / "1")


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize(("size", "strip"), [(400, None), (5000, None), (400, 2000)])
def test_blocks_change_nothing(
    method: str,
    size: int,
    strip: int | None,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same elements are kept, however tensors are cut; TIES to the bit.

    By `rescale`, the default of DARE and DELLA, elements are multiplied by a quotient of two sums,
    and the last bit of a sum depends on where it is cut.
    """
    weft.run(small / f"{method}.yml", output=tmp_path / "usual")
    monkeypatch.setitem(blocks.BLOCK, "cpu", size)
    if strip is not None:
        monkeypatch.setitem(blocks.STRIP, "cpu", strip)
    weft.run(small / f"{method}.yml", output=tmp_path / "cut")
    if method == "ties":
        assert _files(tmp_path / "cut") == _files(tmp_path / "usual")
    for name in _files(tmp_path / "usual"):
        one, other = (load_file(tmp_path / folder / name) for folder in ("usual", "cut"))
        for key, value in one.items():
            off = value != other[key]
            assert float(off.double().mean()) < 1e-3
            assert torch.allclose(value.float(), other[key].float(), rtol=2**-7), key


def _files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.glob("model*.safetensors")}
    assert found
    return found
