"""`weft resize`, killed, starved or given files that lie: the same adapter, or none."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_extract_robustness import AT, KILL, assert_refused, damage
from test_robustness import Nursery, nursery, partial_of, small_disk

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["nursery", "small_disk"]  # the fixtures
FILES = ("adapter_model.safetensors", "adapter_config.json")


def command(adapter: Path, out: Path, *more: str) -> list[str | Path]:
    return ["resize", adapter, "--rank", "4", "-o", out, "--quiet", *more]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of rank 8, 400 kB."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"base_model.model.layers.0.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(8, 2048, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(2048, 8, generator=generator)
    save_file(tensors, folder / FILES[0])
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
    config["target_modules"] = ["q_proj", "k_proj", "v_proj"]
    (folder / FILES[1]).write_text(json.dumps(config))
    return folder


@pytest.fixture
def whole(adapter: Path, nursery: Nursery) -> Path:
    """What an undisturbed run writes."""
    out = adapter.parent / "whole"
    assert nursery.run(command(adapter, out)) == 0, nursery.stderr
    return out


def assert_same(out: Path, whole: Path) -> None:
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    left = [path for path in out.parent.iterdir() if path.name.startswith(f"{out.name}.")]
    assert left == []


@pytest.mark.parametrize(
    ("call", "number", "begun"),
    # Before anything is written, with all written but not in place, and when it is in place.
    [("mkdir", 1, False), ("fsync", 1, True), ("rename", 1, True)],
)
def test_killed(
    call: str, number: int, *, begun: bool, adapter: Path, whole: Path, nursery: Nursery,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert nursery.run(command(adapter, out), AT.format(call=call, number=number, what=KILL)) == -9
    assert not out.exists()
    if begun:
        code = nursery.run(command(adapter, out))
        assert_refused(
            nursery, code, f"{partial_of(out)} is what an interrupted run left", "--force"
        )
        assert not out.exists()
    assert nursery.run(command(adapter, out, *["--force"] * begun)) == 0, nursery.stderr
    assert_same(out, whole)


# Kills the process when the old adapter and the new one have changed places.
KILLED_AFTER = """
import os, signal
from weft.write import _replace
real = _replace.exchange
def exchange(*names):
    real(*names)
    os.kill(os.getpid(), signal.SIGKILL)
_replace.exchange = exchange
"""


@pytest.mark.parametrize("before", [KILLED_AFTER, AT.format(call="unlink", number=2, what=KILL)])
def test_killed_while_an_adapter_is_replaced(
    before: str, adapter: Path, whole: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """At every moment there is a whole one; what is left of the old one goes with the next run."""
    out = tmp_path / "out"
    assert nursery.run([*command(adapter, out), "--dtype", "bfloat16"]) == 0, nursery.stderr
    assert nursery.run(command(adapter, out, "--force"), before) == -9
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert nursery.run(command(adapter, out, "--force")) == 0, nursery.stderr
    assert_same(out, whole)


def test_what_lies_in_the_place_of_the_partial_folder(
    adapter: Path, nursery: Nursery, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial_of(out).mkdir()
    (partial_of(out) / "thesis.txt").write_text("all of it")
    code = nursery.run(command(adapter, out, "--force"))
    assert_refused(nursery, code, "is not what an adapter was being made in")
    assert (partial_of(out) / "thesis.txt").read_text() == "all of it"
    shutil.rmtree(partial_of(out))
    adapter.rename(partial_of(out))
    code = nursery.run(command(partial_of(out), out, "--force"))
    assert_refused(nursery, code, "holds the adapter that is read")
    assert {path.name for path in partial_of(out).iterdir()} == set(FILES)


def test_two_runs_at_once(adapter: Path, whole: Path, nursery: Nursery, tmp_path: Path) -> None:
    """The one that has begun goes on, and the other is refused."""
    out = tmp_path / "out"
    twice = f"""
import fcntl, os
from pathlib import Path
partial = Path({str(partial_of(out))!r})
partial.mkdir()
fcntl.flock(os.open(partial, os.O_RDONLY), fcntl.LOCK_EX)
"""
    code = nursery.run(command(adapter, out, "--force"), twice)
    assert_refused(nursery, code, "another run is writing")
    assert partial_of(out).exists()
    assert nursery.run(command(adapter, out)) == 0, nursery.stderr
    assert_same(out, whole)


def test_a_disk_that_is_too_small_or_fills_up(
    adapter: Path, whole: Path, nursery: Nursery, small_disk: Path
) -> None:
    out, filler = small_disk / "out", small_disk / "filler"
    filler.write_bytes(bytes(950_000))
    assert_refused(nursery, nursery.run(command(adapter, out)), "free, the adapter takes")
    lie = "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 0, 10**12)"
    code = nursery.run(command(adapter, out), lie)
    assert_refused(nursery, code, f"cannot write {out}: No space left", "free some space")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    filler.unlink()
    assert nursery.run(command(adapter, out)) == 0, nursery.stderr
    assert_same(out, whole)


def lie(folder: Path, how: str) -> None:
    """Make a sound adapter one that is not."""
    file = folder / FILES[0]
    damage(file, how)
    if how == "config":
        (folder / FILES[1]).write_text("{")
    elif how == "half":
        tensors = load_file(file)
        del tensors[next(key for key in tensors if "lora_B" in key)]
        save_file(tensors, file)


@pytest.mark.parametrize("how", ["cut", "empty", "header", "config", "none", "half"])
def test_files_that_lie(how: str, adapter: Path, nursery: Nursery, tmp_path: Path) -> None:
    lie(adapter, how)
    assert_refused(nursery, nursery.run(command(adapter, tmp_path / "out")), str(adapter))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
