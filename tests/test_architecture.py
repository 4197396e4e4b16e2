"""The layers that pyproject.toml draws, and the names that the package shows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import weft

ROOT = Path(__file__).parents[1]

pytest.importorskip("importlinter")


def lint(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "lint-imports"
    return subprocess.run(
        [program, "--no-cache", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_imports_go_one_way() -> None:
    done = lint()
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout
    assert " 0 kept" not in done.stdout


def test_the_linter_would_notice(tmp_path: Path) -> None:
    """Of a rule that the code breaks it says so."""
    rule = "[importlinter]\nroot_package = weft\n[importlinter:contract:1]\nname = upside down\n"
    rule += "type = layers\ncontainers = weft\nlayers =\n  core\n  api\n"
    (tmp_path / "rules.ini").write_text(rule)
    done = lint("--config", tmp_path / "rules.ini")
    assert done.returncode == 1
    assert "upside down BROKEN" in done.stdout


def test_public_names_resolve() -> None:
    assert len(weft.__all__) == len(set(weft.__all__)) > 3
    for name in weft.__all__:
        found = getattr(weft, name)
        assert found.__name__ == name
        assert found.__doc__
        assert found.__module__.startswith("weft.")
    assert set(dir(weft)) == set(weft.__all__)


def test_other_names_do_not() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'mergee'"):
        weft.mergee  # noqa: B018


def test_what_is_imported_is_installed() -> None:
    """Every package that the source imports is a dependency, or one of an extra's own folder."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {re.split(r"[<>=\[;~! ]", each)[0] for each in project["dependencies"]}
    named = {{"pyyaml": "yaml"}.get(name, name) for name in named} | {"weft"}
    for path in sorted((ROOT / "src/weft").rglob("*.py")):
        if "demo" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                assert top in named or top in sys.stdlib_module_names, f"{path}: {name}"
