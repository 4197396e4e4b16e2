"""The k-th largest, exactly: against a stable sort, on tensors that mislead the sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from memory_blocks import MemoryBlocks

from weft import methods
from weft.methods import _select
from weft.methods._select import Rank

COLUMNS = 64


def blocks_of(values: torch.Tensor, size: int = 2**14) -> MemoryBlocks:
    own = methods.method("linear")
    return MemoryBlocks(own, None, [values.view(-1, COLUMNS)], COLUMNS, size)


def taken(values: np.ndarray, cut: _select.Cut, rank: Rank) -> np.ndarray:
    first = np.arange(values.size) < cut.stop
    beyond = values > cut.value if rank.largest else values < cut.value
    return beyond | ((values == cut.value) & first)


def make(kind: str, n: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(n, generator=draw).abs()
    match kind:
        case "few values":
            values = (values * 4).round() / 4
        case "one value":
            values = torch.ones(n)
        case "mostly zero":
            values *= torch.rand(n, generator=draw) > 0.8
        case "sorted":
            values = values.sort().values
        case "first rows of all blocks are tiny":
            values.view(-1, COLUMNS)[:: 2**14 // COLUMNS] *= 1e-6
            values.view(-1, COLUMNS)[1 :: 2**14 // COLUMNS] *= 1e-6
        case "bfloat16":
            values = values.bfloat16().float()
        case "rows differ":
            rows = values.view(-1, COLUMNS)
            rows *= torch.randn(len(rows), 1, generator=draw).exp()
        case "huge range":
            values = torch.exp(15 * values)
    return values


KINDS = [
    "normal",
    "few values",
    "one value",
    "mostly zero",
    "sorted",
    "first rows of all blocks are tiny",
    "bfloat16",
    "huge range",
    "rows differ",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [True, False])
def test_exactly_as_many_as_a_stable_sort_takes(
    kind: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 2**17
    values = make(kind, n)
    monkeypatch.setattr(_select, "WHOLE", 2**20 if whole else 0)
    blocks = blocks_of(values)
    sizes = [0, 1, 17, n // 10, n // 2, n - 1000, n - 1, n]
    ranks = [Rank(0, size, largest) for size in sizes for largest in (True, False)]
    found = _select.cuts(n, blocks, lambda block, _: block.inputs[0], ranks)
    ours = values.numpy()
    for rank, cut in zip(ranks, found, strict=True):
        order = np.argsort(-ours if rank.largest else ours, kind="stable")[: rank.size]
        expected = np.zeros(n, bool)
        expected[order] = True
        wrong = taken(ours, cut, rank) != expected
        assert not wrong[ours > 0].any(), (kind, rank)  # zeros are not told apart


@pytest.mark.parametrize("kind", ["normal", "rows differ"])
def test_a_fair_sample_needs_one_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_select, "WHOLE", 0)
    blocks = blocks_of(make(kind, 2**21))
    ranks = [Rank(0, 2**20), Rank(0, 2**19, largest=False)]
    _select.cuts(2**21, blocks, lambda block, _: block.inputs[0], ranks)
    assert blocks.passes < 1.1


def test_nan_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported where the result is checked; here it must only not loop for ever."""
    for whole in (0, 2**20):
        monkeypatch.setattr(_select, "WHOLE", whole)
        values = make("normal", 2**16)
        values[100:60000] = math.nan
        blocks = blocks_of(values)
        (cut,) = _select.cuts(2**16, blocks, lambda block, _: block.inputs[0], [Rank(0, 2**15)])
        assert cut.value == cut.value  # no NaN
        assert blocks.passes < 10
