"""What `weft extract` refuses, and that threads, seeds and interruptions change nothing."""

from __future__ import annotations

import json
import math
import socket
from typing import TYPE_CHECKING, Any

import pairs
import pytest
import torch
from pairs import extract
from safetensors.torch import load_file

import weft
from weft.core.errors import NumericsError, OutputError, PlanError, WeftError
from weft.core.events import Moved
from weft.execute import assembly

if TYPE_CHECKING:
    from pathlib import Path


# --------------------------------------------------------------------------------------- refusals


def test_all_problems_at_once(tmp_path: Path) -> None:
    tensors = pairs.weights()
    base = pairs.write(tmp_path / "base", tensors)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    pairs.write(tmp_path / "tuned", tensors)
    with pytest.raises(PlanError) as caught:
        extract(tmp_path, base=base, target="self_atn")
    said = str(caught.value)
    assert "has no model.norm.weight" in said
    assert "q_proj.weight is [3, 3]" in said
    assert "did you mean 'self_attn'?" in said


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path, side: str, value: float) -> None:
    pairs.pair(tmp_path)
    tensors = load_file(tmp_path / side / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][7, 9] = value
    pairs.write(tmp_path / "odd", tensors)
    with pytest.raises(NumericsError, match=rf"{side}.*layers\.1\.self_attn\.o_proj"):
        extract(tmp_path, **{side: tmp_path / "odd"})
    assert not (tmp_path / "adapter.partial").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 4, "energy": 0.5}, "rank and energy are given"),
        ({"rank": "automatic"}, "a number or auto"),
        ({"energy": 1.5}, "is a share"),
        ({"rank": 0}, "makes no sense"),
        ({"embed": "no"}, "--embed no"),
        ({"target": "/(/"}, "no regular expression"),
        ({"dtype": "int8"}, "unknown output dtype"),
    ],
)
def test_wishes_that_make_no_sense(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(WeftError, match=message):
        weft.extract("tuned", base="base", output=tmp_path / "adapter", **given)


# --------------------------------------------------------------------- resumed, and by many threads


def bytes_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rule", [{"rank": 8}, {"energy": 0.7}, {"size": "200kB"}, {"rank": "auto"}]
)
def test_threads_and_seeds(tmp_path: Path, rule: dict[str, Any], dtype: torch.dtype) -> None:
    pairs.pair(tmp_path, dtype)
    one, _ = extract(tmp_path, "one", threads=1, **rule)
    four, _ = extract(tmp_path, "four", threads=4, **rule)
    assert bytes_of(one) == bytes_of(four)
    if rule == {"rank": 8}:  # where some matrices are not factorised in full
        other, _ = extract(tmp_path, "other", threads=1, seed=1, **rule)
        assert bytes_of(one) != bytes_of(other)


@pytest.mark.parametrize("at", [1, 7])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, at: int) -> None:
    pairs.pair(tmp_path)
    whole, _ = extract(tmp_path, "whole", rank=8)
    seen = 0

    def interrupt(event: object) -> None:
        nonlocal seen
        seen += isinstance(event, Moved)
        if seen == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, rank=8, threads=1, on_event=interrupt)
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(OutputError, match="interrupted run left"):
        extract(tmp_path, rank=8)
    with pytest.raises(OutputError, match="other inputs or options"):
        extract(tmp_path, rank=9, resume=True)
    report = weft.extract(
        tmp_path / "tuned",
        base=tmp_path / "base",
        output=tmp_path / "adapter",
        rank=8,
        dtype="float32",
        resume=True,
    )
    assert report.resumed >= at
    assert bytes_of(tmp_path / "adapter") == bytes_of(whole)
    assert not (tmp_path / "adapter.partial").exists()


def test_interrupted_while_the_adapter_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs.pair(tmp_path)
    whole, _ = extract(tmp_path, "whole", rank=8)
    original = assembly.Assembly.values

    def full(self: Any, entry: Any) -> Any:
        if "layers.1" in entry.key:
            raise OSError(28, "No space left on device")
        return original(self, entry)

    monkeypatch.setattr(assembly.Assembly, "values", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        extract(tmp_path, rank=8)
    assert "--resume" in (caught.value.hint or "")
    assert not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    adapter, _ = extract(tmp_path, rank=8, resume=True)
    assert bytes_of(adapter) == bytes_of(whole)


def test_force_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    pairs.pair(tmp_path)
    adapter, _ = extract(tmp_path, rank=2)
    with pytest.raises(OutputError, match="exists"):
        extract(tmp_path, rank=3)
    extract(tmp_path, rank=3, force=True)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 3
    (adapter / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        extract(tmp_path, rank=3, force=True)


def test_no_network_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MergeKit asks the hub about a local base when all work is done, and dies there."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    pairs.pair(tmp_path)
    weft.extract("tuned", base="base", output="adapter", rank=2)
    assert "weft.extract" in (tmp_path / "adapter" / "README.md").read_text()
