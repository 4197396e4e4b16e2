"""The wheel, built and installed into an environment of its own, works."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from weft import native

ROOT = Path(__file__).parents[1]
GOOD = ROOT / "tests/attacks/corpus/good"
# What pip says where the index cannot be reached; the build itself has not begun by then.
NO_NETWORK = r"Failed to establish|NewConnectionError|Could not find a version|Temporary failure"

pytestmark = pytest.mark.slow


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process that does not find this checkout by accident."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = list(map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=kept)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    alone = [] if importlib.util.find_spec("hatchling") is None else ["--no-isolation"]
    done = run(sys.executable, "-m", "build", "--wheel", *alone, "--outdir", out, ROOT)
    if done.returncode and not alone and re.search(NO_NETWORK, done.stdout + done.stderr):
        pytest.skip("hatchling is not installed, and cannot be fetched")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def weft(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of a new environment: the wheel, and this environment's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    install = ["-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    done = run(sys.executable, *install)
    assert done.returncode == 0, done.stdout + done.stderr
    # Behind the wheel, so that its files come first, and without the links of this environment
    # to its own checkout: files that end in .pth are not followed from here.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin/weft"


def test_platform(wheel: Path) -> None:
    """A wheel with compiled loops is of one platform, and of any Python."""
    assert wheel.name.endswith("-py3-none-any.whl") == (native.library() is None)
    assert "-py3-none-" in wheel.name


def test_contents(wheel: Path) -> None:
    """All modules, the licence, and nothing that is not part of the package."""
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src/weft").rglob("*.py")}
    assert package <= names
    others = {name.partition("/")[0] for name in names - package}
    assert {name.partition(".dist-info")[0].partition("-")[0] for name in others} == {"weft"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test" in name or name.endswith((".pyc", ".partial"))]


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    text = archive.read(name).decode()
    for line in ("Name: weft", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"):
        assert f"\n{line}\n" in text
    assert re.search(r"^Requires-Dist: torch>=", text, re.MULTILINE)
    assert not re.search(r"^Requires-Dist: (transformers|peft)[^;]*$", text, re.M)


def test_it_is_the_wheel_that_runs(weft: Path, tmp_path: Path) -> None:
    code = "import weft, weft.api; print(weft.__file__); print(weft.api.__file__)"
    done = run(weft.parent / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert Path(line).is_relative_to(weft.parents[1])


def test_help(weft: Path, tmp_path: Path) -> None:
    done = run(weft, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: weft" in done.stdout
    done = run(weft, "--version", cwd=tmp_path)
    number, _, loops = done.stdout.strip().partition(" ")
    assert number in (weft.parents[1] / "lib").rglob("*.dist-info").__next__().name
    # The loops that were compiled for this environment are in the wheel, too.
    assert (loops == "(compiled loops)") == (native.library() is not None)


@pytest.mark.parametrize("name", ["base", "zip", "adapter"])
def test_inspect(name: str, weft: Path, tmp_path: Path) -> None:
    done = run(weft, "inspect", GOOD / name, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["kind"] == ("adapter" if name == "adapter" else "base")


def test_merge(weft: Path, tmp_path: Path) -> None:
    done = run(weft, "merge", GOOD / "base", GOOD / "adapter", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 tensors changed" in done.stdout
    assert (tmp_path / "out/model.safetensors").exists()
