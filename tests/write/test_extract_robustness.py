"""An extraction, killed, starved or given files that lie: the same bytes, or no adapter."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_robustness import JOURNAL, Nursery, nursery, partial_of, small_disk

import weft
from tests.extract import pairs
from weft.core.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["nursery", "small_disk"]  # the fixtures
FILES = ("adapter_model.safetensors", "adapter_config.json")


def command(models: Path, out: Path, *more: str) -> list[str | Path]:
    tuned, base = models / "tuned", models / "base"
    return ["extract", tuned, "--base", base, "-o", out, "--quiet", "--dtype", "float32", *more]


def assert_same(out: Path, whole: Path) -> None:
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    one, other = (json.loads((folder / "weft.json").read_text()) for folder in (out, whole))
    assert all(one[key] == other[key] for key in ("plan", "tensors", "modules", "totals"))
    assert not partial_of(out).exists()


def assert_refused(nursery: Nursery, code: int, *says: str) -> None:
    lines = nursery.stderr.splitlines()
    assert code == 2, nursery.stderr
    assert "Traceback" not in nursery.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert sum(line.startswith("hint: ") for line in lines) <= 1
    for part in says:
        assert part in nursery.stderr, nursery.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    pairs.pair(root)
    return root


@pytest.fixture(scope="module")
def whole(models: Path, nursery: Nursery) -> Path:
    """What an undisturbed run writes."""
    out = models / "whole"
    assert nursery.run(command(models, out, "--rank", "8")) == 0, nursery.stderr
    return out


# ------------------------------------------------------------------------------------------- killed

# Kills the process, or raises, at the so-and-so-manieth call of a function of `os`.
AT = """
import os, signal
real, seen = os.{call}, 0
def disturbed(*arguments, **options):
    global seen
    seen += 1
    if seen == {number}:
        {what}
    return real(*arguments, **options)
os.{call} = disturbed
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("call", "number"),
    # Of the first tensor, in the midst of them, with all written but not in place, and in place.
    [("rename", 1), ("rename", 6), ("fsync", 1), ("rename", -1)],
)
def test_killed_and_resumed(
    call: str, number: int, models: Path, whole: Path, nursery: Nursery, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if number < 0:
        number = calls(call, models, nursery, tmp_path)
    options = ("--rank", "8", "--threads", "1")
    kill = AT.format(call=call, number=number, what=KILL)
    assert nursery.run(command(models, out, *options), kill) == -9
    assert not out.exists()
    assert (partial_of(out) / JOURNAL).exists()
    assert_refused(nursery, nursery.run(command(models, out, *options)), "--resume", "--force")
    other = command(models, out, "--rank", "9", "--resume")
    assert_refused(nursery, nursery.run(other), "other inputs or options")
    assert nursery.run([*command(models, out, "--rank", "8"), "--resume"]) == 0, nursery.stderr
    assert_same(out, whole)


def calls(call: str, models: Path, nursery: Nursery, tmp_path: Path) -> int:
    """How often a whole run calls it."""
    told = tmp_path / "calls"
    count = (
        AT.format(call=call, number=-1, what="pass")
        + f"""
import atexit
end = os._exit
os._exit = lambda code: (open({str(told)!r}, "w").write(str(seen)), end(code))
"""
    )
    options = ("--rank", "8", "--threads", "1")
    assert nursery.run(command(models, tmp_path / "counted", *options), count) == 0
    found = int(told.read_text())
    assert found > 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rule", [("--rank", "auto"), ("--size", "400kB")])
def test_killed_at_random_moments(rule: tuple[str, str], nursery: Nursery, tmp_path: Path) -> None:
    """Each kill is of the run that goes on from the one before."""
    pairs.pair(tmp_path, torch.bfloat16, delta=pairs.low_rank(12, 2e-3), layers=10)
    one, out = tmp_path / "one", tmp_path / "out"
    begin = time.perf_counter()
    assert nursery.run(command(tmp_path, one, *rule)) == 0, nursery.stderr
    length = time.perf_counter() - begin
    rng = random.Random(3)
    killed = 0
    for _ in range(5):
        more = ["--resume"] if partial_of(out).exists() else []
        nursery.begin([*command(tmp_path, out, *rule), *more])
        time.sleep(length * (0.1 + 0.4 * rng.random()))
        nursery.kill()
        if nursery.end() == 0 or out.exists():
            assert_same(out, one)
            shutil.rmtree(out)
        else:
            killed += 1
    assert killed >= 2
    more = ["--resume"] if partial_of(out).exists() else []
    assert nursery.run([*command(tmp_path, out, *rule), *more]) == 0, nursery.stderr
    assert_same(out, one)


# --------------------------------------------------------------------------------------- full disks


def test_a_disk_that_fills_up(
    models: Path, whole: Path, nursery: Nursery, small_disk: Path
) -> None:
    """While factors are kept, or while the adapter is made of them: what is done stays done."""
    out, filler = small_disk / "out", small_disk / "filler"
    for size in (980_000, 830_000):
        filler.write_bytes(bytes(size))
        again = ["--resume"] if partial_of(out).exists() else []
        code = nursery.run([*command(models, out, "--rank", "8"), *again])
        assert_refused(nursery, code, "free", "--resume")
        assert not out.exists()
        filler.unlink()
    assert nursery.run([*command(models, out, "--rank", "8"), "--resume"]) == 0, nursery.stderr
    assert_same(out, whole)


def test_too_small_a_disk_is_told_before_and_refused_before_it_is_written_to(
    models: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """That not all may have changed shows only when all is read."""
    out = tmp_path / "out"
    little = (
        "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 50_000)"
    )
    dry = [*command(models, out, "--rank", "8"), "--dry-run"]
    assert nursery.run(dry, little) == 0
    assert "50.0 kB free; if every tensor changed, this takes" in nursery.stderr
    code = nursery.run(command(models, out, "--rank", "8"), little)
    assert_refused(nursery, code, "50.0 kB free, the adapter takes", "--resume")
    assert nursery.run([*command(models, out, "--rank", "8"), "--resume"]) == 0, nursery.stderr


def test_file_size_limit(models: Path, whole: Path, nursery: Nursery, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    code = nursery.run(command(models, out, "--rank", "8"), limit)
    assert_refused(nursery, code, str(out))
    assert not out.exists()
    assert nursery.run([*command(models, out, "--rank", "8"), "--resume"]) == 0, nursery.stderr
    assert_same(out, whole)


def test_an_input_that_changes_meanwhile(models: Path, nursery: Nursery, tmp_path: Path) -> None:
    for name in ("tuned", "base"):
        shutil.copytree(models / name, tmp_path / name)
    changed = f"""
from weft.execute import assembly
real = assembly.Assembly.values
def values(self, entry):
    open({str(tmp_path / "tuned" / "model.safetensors")!r}, "r+b").write(b" ")
    return real(self, entry)
assembly.Assembly.values = values
"""
    out = tmp_path / "out"
    code = nursery.run(command(tmp_path, out, "--rank", "8"), changed)
    assert_refused(nursery, code, "changed while it was being read")
    assert not out.exists()


# --------------------------------------------------------------------------------- malformed inputs


def damage(file: Path, how: str) -> None:
    """Make a file of safetensors none, if `how` says in what way."""
    data = file.read_bytes()
    if how == "cut":
        file.write_bytes(data[:-100])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "header":
        file.write_bytes(data[:8] + b"x" * 64 + data[72:])
    elif how == "none":
        file.unlink()


def lie(folder: Path, how: str) -> None:
    """Make a sound model one that is not."""
    file = folder / "model.safetensors"
    damage(file, how)
    if how == "config":
        (folder / "config.json").write_text("{")
    elif how == "integers":
        tensors = load_file(file)
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = torch.ones(pairs.SHAPES["q_proj"], dtype=torch.int8)
        tensors[f"{name}_scale"] = torch.ones(1)
        save_file(tensors, file)
    elif how == "elsewhere":
        index = {"weight_map": {"model.norm.weight": "../../base/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        file.unlink()


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize(
    "how", ["cut", "empty", "header", "config", "none", "integers", "elsewhere"]
)
def test_files_that_lie(
    how: str, side: str, models: Path, nursery: Nursery, tmp_path: Path
) -> None:
    for name in ("tuned", "base"):
        shutil.copytree(models / name, tmp_path / name)
    lie(tmp_path / side, how)
    out = tmp_path / "out"
    assert_refused(nursery, nursery.run(command(tmp_path, out)), side)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_an_adapter_in_the_place_of_a_base(models: Path, whole: Path, tmp_path: Path) -> None:
    """Its base is what it names; and an output over an input is refused."""
    report = weft.extract(
        f"{models / 'base'}+{whole}", base=models / "base", output=tmp_path / "same", rank=8
    )
    assert report.manifest["totals"]["modules"] == 10
    with pytest.raises(OutputError, match="exists"):
        weft.extract(models / "tuned", base=models / "base", output=models, rank=8, force=True)


# ------------------------------------------------------------------------------------------- memory

PEAK = """
import sys
import weft
report = weft.extract(sys.argv[1], base=sys.argv[2], output=sys.argv[3], rank=8, threads=1)
print(report.manifest["totals"]["modules"])
# getrusage would count what the process that forked this one had held, too.
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """100 MB more of weights in both together, and hardly any of memory."""
    peaks = []
    for layers in (2, 22):
        root = tmp_path / str(layers)
        generator = torch.Generator().manual_seed(0)
        for name in ("base", "tuned"):
            weight = 0.02 * torch.randn(800, 800, generator=generator)
            tensors = {
                f"model.layers.{n}.self_attn.q_proj.weight": (n + 1) * weight for n in range(layers)
            }
            pairs.write(root / name, tensors)
        run = [sys.executable, "-c", PEAK, root / "tuned", root / "base", root / "out"]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        modules, peak = done.stdout.split()
        assert int(modules) == layers
        peaks.append(1024 * int(peak))
    assert peaks[1] - peaks[0] < 20e6, peaks
