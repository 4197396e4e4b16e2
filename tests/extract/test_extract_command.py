"""`weft extract` as a command: what it prints, and where."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

import pairs
import pytest

from weft.cli.app import main

if TYPE_CHECKING:
    from pathlib import Path


def run(root: Path, *arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    common = ["extract", str(root / "tuned"), "--base", str(root / "base")]
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([*common, *arguments])
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def test_the_report(tmp_path: Path) -> None:
    pairs.pair(tmp_path)
    out = tmp_path / "adapter"
    code, text, err = run(tmp_path, "-o", str(out), "--rank", "8", "--exclude", "layers.1.")
    assert code == 0
    lines = text.splitlines()
    assert lines[0].startswith("6 modules of rank 8, 3 tensors in full; 0 tensors did not change")
    assert "of ‖ΔW‖² kept; error" in lines[2]
    at = next(n for n, line in enumerate(lines) if line.startswith("largest errors"))
    worst = [line.split()[0] for line in lines[at + 1 : at + 6]]
    manifest = json.loads((out / "weft.json").read_text())
    modules = manifest["modules"]
    errors = {name: module["relative_error"] for name, module in modules.items()}
    assert worst == manifest["worst"] == sorted(errors, key=lambda name: -errors[name])[:5]
    assert lines[-1].startswith("loads in PEFT; vLLM, SGLang and TGI refuse it")
    assert "6 changed tensors" in err
    assert "--exclude layers.1." in err


def test_json_and_dry_run(tmp_path: Path) -> None:
    pairs.pair(tmp_path)
    out = tmp_path / "adapter"
    code, text, _ = run(tmp_path, "--dry-run", "--json", "--rank", "4")
    assert code == 0
    planned = json.loads(text)
    assert {tensor["action"] for tensor in planned["tensors"].values()} == {"decompose", "save"}
    assert not out.exists()
    assert "decompose (linear)" in run(tmp_path, "--dry-run")[1]
    code, text, _ = run(tmp_path, "-o", str(out), "--rank", "4", "--json")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (code, found["output"]) == (0, str(out))
    assert found["manifest"] == json.loads((out / "weft.json").read_text())
    assert planned["plan"] == found["manifest"]["plan"]


def test_ranks_of_single_modules(tmp_path: Path) -> None:
    pairs.pair(tmp_path, moved=lambda name: "_proj.weight" in name)
    out = tmp_path / "adapter"
    ranks = ("--rank", "layers.0.self_attn.o_proj,down_proj=9", "--rank", "4", "--rank", "/o_p/=5")
    assert run(tmp_path, "-o", str(out), *ranks, "--quiet") == (0, "", "")
    modules = json.loads((out / "weft.json").read_text())["modules"]
    found = {name.split(".")[2] + name.split(".")[4]: m["rank"] for name, m in modules.items()}
    assert found == {
        "0q_proj": 4,
        "0down_proj": 9,
        "0o_proj": 9,
        "0k_proj": 4,
        "1q_proj": 4,
        "1down_proj": 9,
        "1o_proj": 5,
        "1k_proj": 4,
    }


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-o", "out", "--rank", "4", "--rank", "8"], "one of them is the rank of every module"),
        (["-o", "out", "--rank", "q_proj=many"], "--rank q_proj=many is no filter with a number"),
        (["-o", "out", "--rank", "=8"], "--rank =8 is no filter with a number"),
        (["-o", "out", "--rank", "q_proj=0"], "a rank below 1 makes no sense"),
        (["-o", "out", "--rank", "q_prj=8"], "did you mean 'q_proj'?"),
        (["-o", "out", "--uniform-rank", "--rank", "q_proj=8"], "contradict each other"),
        (["--rank", "4"], "no output given"),
        (["-o", "out", "--rank", "4", "--size", "3MB"], "rank and size are given"),
        (["-o", "out", "--rank", "none"], "a number or auto"),
        (["-o", "out", "--target", "self_atn"], "did you mean 'self_attn'?"),
        (["-o", "out", "--embed", "no"], "--embed no"),
        (["-o", "out", "--size", "many"], "many"),
        (["-o", "base/config.json/x"], "give another -o"),
        (["-o", "base/config.json", "--force"], "remove it yourself"),
        (["-o", "base", "--force"], "remove it yourself"),
    ],
)
def test_mistakes(
    arguments: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs.pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(tmp_path, *arguments)
    assert (code, out) == (2, "")
    assert error in err
    assert "--force replaces" not in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
