"""`weft diff` as a command: exit codes, one screen of text, one object of JSON."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

import pytest
import torch

import weft
from weft.cli.app import main

if TYPE_CHECKING:
    from tests.conftest import Folders

MODULES = [f"model.layers.{n}.{m}" for n in range(40) for m in ("attn.q", "mlp.up", "mlp.down")]


def run(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(["diff", *map(str, arguments)])
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def test_equal(folders: Folders) -> None:
    one, other = folders.base(), folders.base(name="other")
    code, out, err = run(one, other)
    assert (code, err) == (0, "")
    assert out.startswith(f"{one} equals {other}: 1 tensor, 64 elements")
    assert run(one, other, "-q") == (0, "", "")


def test_different(folders: Folders) -> None:
    one = folders.base(MODULES, {"model.norm.weight": torch.ones(8)}, num_hidden_layers=40)
    changed = {f"{MODULES[n]}.weight": torch.randn(8, 8) for n in (3, 30, 60)}
    changed |= {"model.norm.weight": torch.ones(8), "extra.weight": torch.ones(2)}
    changed[f"{MODULES[4]}.weight"] = torch.full((8, 8), float("nan"))
    other = folders.base(MODULES, changed, name="other", num_hidden_layers=40)
    code, out, err = run(other, one, "--top", 2, "--ranks")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert len(lines) <= 24
    assert lines[0].split()[:2] == ["tensors", "differ"]
    assert lines[1].startswith("attn.q.weight")
    assert "3 of 40" in lines[1]
    assert "equal: 2 types (mlp.down.weight, model.norm.weight)" in lines
    assert any(line.startswith("model.layers  ·") for line in lines)
    assert f"note: only in {other}: tensor extra.weight" in lines
    assert any("has 64 elements NaN or infinite in tensor" in line for line in lines)
    assert "most, of 4:" in lines
    assert "differ" in lines[-1]
    assert "1 cannot be compared" in lines[-1]
    assert run(other, one, "-q") == (1, "", "")


def test_nothing_can_be_compared(folders: Folders) -> None:
    one = folders.base([], {"model.norm.weight": torch.ones(8)}, name="one")
    other = folders.base([], {"model.norm.weight": torch.ones(9)}, name="two")
    code, out, _ = run(other, one)
    assert code == 1
    last = out.splitlines()[-1]
    assert "none of 1 tensor can be compared" in last
    assert "0 of 0" not in last


def test_one_element(folders: Folders) -> None:
    one = folders.base(["up"], {"up.weight": torch.tensor([1.0, float("nan")])})
    other = folders.base(["up"], {"up.weight": torch.ones(2)}, name="other")
    assert f"{one} has 1 element NaN or infinite in tensor up.weight" in run(one, other)[1]


def test_json(folders: Folders) -> None:
    one = folders.base()
    other = folders.base(tensors={"layers.0.q_proj.weight": torch.zeros(8, 8)}, name="other")
    code, out, _ = run(one, other, "--json", "-q")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert (code, found["schema"], found["equal"]) == (1, 1, False)
    tensor = found["tensors"]["layers.0.q_proj.weight"]
    assert (tensor["changed"], tensor["relative"]) == (64, None)
    assert tensor["difference"] == found["totals"]["difference"] > 0


def test_a_merge_that_changed_nothing_is_told(folders: Folders) -> None:
    base, merged = folders.base(), folders.root / "merged"
    zero = {"layers.0.q_proj.lora_B.weight": torch.zeros(8, 2)}
    weft.merge(base, folders.adapter(tensors=zero), output=merged)
    code, out, _ = run(merged, base)
    assert code == 0
    assert f"merged {merged} from {base} and adapter" in out
    assert "hint: the merge changed nothing" in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "A is missing"),
        (["base"], "B is missing"),
        (["base", "nowhere"], "no such file or folder: nowhere"),
        (["base", "base", "--filter", "nothing"], "the filter matches none"),
        (["base", "base", "--filter", "/(/"], "is no regular expression"),
        (["base", "base", "--top", "-1"], "--top -1"),
        (["base", "base", "--threads", "0"], "0 threads"),
        (["base", "base+"], "lacks a path"),
    ],
)
def test_mistakes(
    arguments: list[str], error: str, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.base()
    monkeypatch.chdir(folders.root)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert error in err.splitlines()[0]
    assert err.splitlines()[1].startswith("hint: ")


def test_some_tensors_do_not_tell_of_the_merge(folders: Folders) -> None:
    base, merged = folders.base(tensors={"norm.weight": torch.ones(8)}), folders.root / "merged"
    weft.merge(base, folders.adapter(), output=merged)
    assert run(merged, base)[0] == 1
    code, out, _ = run(merged, base, "--filter", "norm")
    assert code == 0
    assert "changed nothing" not in out
