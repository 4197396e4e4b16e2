"""Masks drawn at random: how many are kept, what they depend on, and what they do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from memory_blocks import merge

from weft.methods import _random, _sparsify

METHODS = ["dare_ties", "dare_linear", "della", "della_linear"]
SHAPE = (48, 64)


def drawn(
    method: str, key: str = "a", count: int = 1, *, rescale: bool = False, **options: int
) -> torch.Tensor:
    """Which elements are kept: all changes are 1, up to their order."""
    base = torch.zeros(SHAPE)
    inputs = [1 + torch.arange(48 * 64).view(SHAPE) / 1e5] * count
    each = {"weight": [1.0] + [0.0] * (count - 1), "density": [0.6] * count}
    params = {"rescale": rescale, "normalize": False}
    return merge(method, base, inputs, params, each, key=key, **options) != 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rescale", [True, False])
def test_the_mask_depends_on_the_key_alone(method: str, rescale: bool) -> None:
    mask = drawn(method, rescale=rescale)
    for size in (64, 192, 1000):
        assert torch.equal(drawn(method, rescale=rescale, size=size, run_size=320), mask)
    assert not torch.equal(drawn(method, "b", rescale=rescale), mask)
    assert torch.equal(drawn(method, rescale=not rescale), mask)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_inputs_draw_apart(method: str) -> None:
    base = torch.zeros(SHAPE)
    change = torch.ones(SHAPE)
    each = {"weight": [1.0, 10.0], "density": [0.5, 0.5]}
    both = merge(method, base, [change, change.clone()], {"rescale": False}, each)
    kinds = [float((both == value).double().mean()) for value in (0, 1, 10, 11)]
    # Of 3072: each a quarter, whose deviation is 0.8 %.
    assert all(abs(kind - 0.25) < 0.04 for kind in kinds)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1 / 3, 1e-6])
def test_bernoulli_keeps_its_share(density: float) -> None:
    n = 2**20
    kept = _random.bernoulli("key", density, 0, n)
    assert abs(kept.sum() - density * n) < 5 * (density * (1 - density) * n) ** 0.5 + 1
    pairs = kept[1:] & kept[:-1]
    assert abs(pairs.mean() - density**2) < 5 * density / n**0.5 + 1e-5


def test_what_16_bits_leave_open_is_drawn_too() -> None:
    """A density below 2⁻¹⁶ is kept, and not rounded to 0 or to 2⁻¹⁶."""
    n = 2**24
    kept = sum(int(_random.bernoulli("key", 4e-6, at, 2**20).sum()) for at in range(0, n, 2**20))
    assert abs(kept - 4e-6 * n) < 5 * (4e-6 * n) ** 0.5  # 67 ± 41; 2⁻¹⁶ would be 256


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 8, 63, 1000])
def test_an_elements_number_is_its_own(start: int) -> None:
    whole = _random.uniform32("key", 0, 2000)
    assert np.array_equal(_random.uniform32("key", start, 77), whole[start : start + 77])
    mask = _random.bernoulli("key", 0.3, 0, 2000)
    assert np.array_equal(_random.bernoulli("key", 0.3, start, 77), mask[start : start + 77])


def test_the_streams_are_what_they_were() -> None:
    """A merge of today is made again by any later version: these numbers must never change."""
    assert _random.uniform32("weft", 5, 3).tolist() == [331369149, 682620759, 1248936305]
    assert np.flatnonzero(_random.bernoulli("weft", 0.25, 0, 32)).tolist() == [
        0,
        6,
        11,
        13,
        17,
        21,
        25,
        27,
        28,
    ]


def ranks_kept(magnitudes: torch.Tensor, trials: int) -> np.ndarray:
    found = np.zeros(magnitudes.shape[-1])
    rows = magnitudes.expand(64, -1)
    for trial in range(trials):
        values = rows.clone().view(-1)
        _sparsify.ByRank(str(trial), 0.6, 0.2, rows.shape[1])(0, values)
        found += (values.view(rows.shape) != 0).double().mean(0).numpy()
    return found / trials


def test_della_keeps_by_rank() -> None:
    order = torch.randperm(41, generator=torch.Generator().manual_seed(3))
    rate = ranks_kept((1 + order).float(), 100)
    expected = 0.4 + 0.4 * order.numpy() / 40
    assert np.abs(rate - expected).max() < 5 * 0.5 / 80  # of 6400


def test_della_shares_ranks_between_equals() -> None:
    sizes = torch.tensor([1.0, 2, 2, 2, 2, 3, 3, 9])
    mean = np.array([0, 2.5, 2.5, 2.5, 2.5, 5.5, 5.5, 7])
    rate = ranks_kept(sizes, 100)
    assert np.abs(rate - (0.4 + 0.4 * mean / 7)).max() < 5 * 0.5 / 80


def test_della_ranks_along_dimension_1() -> None:
    """Of a stack down the columns of each matrix, whatever the blocks and threads."""
    shape = (3, 7, 5)
    draw = torch.Generator().manual_seed(1)
    base, change = torch.zeros(shape), 1 + torch.rand(shape, generator=draw)
    rank = change.argsort(1).argsort(1).double()
    each = {"weight": [1.0], "density": [0.6], "epsilon": [0.3]}
    params = {"rescale": False, "normalize": False}
    rate = torch.zeros(shape, dtype=torch.float64)
    for trial in range(1500):
        rate += merge("della_linear", base, [change], params, each, key=str(trial)) != 0
    assert float((rate / 1500 - (0.3 + 0.6 * rank / 6)).abs().max()) < 5.5 * 0.5 / 1500**0.5
    whole = merge("della_linear", base, [change], {}, each)
    for size in (5, 35, 70):
        assert torch.equal(merge("della_linear", base, [change], {}, each, size=size), whole)


def test_della_of_a_number() -> None:
    """MergeKit has no dimension to rank along, and fails."""
    each = {"weight": [1.0], "density": [0.5]}
    base, change = torch.tensor(0.0), torch.tensor(1.0)
    keys = map(str, range(400))
    kept = sum(int(merge("della", base, [change], {}, each, key=key)) for key in keys)
    assert abs(kept - 200) < 5 * 10


def test_a_row_of_one_is_kept_by_its_density() -> None:
    assert abs(ranks_kept(torch.ones(1), 100)[0] - 0.6) < 5 * 0.5 / 80


def test_the_l1_norm_comes_back() -> None:
    draw = torch.Generator().manual_seed(0)
    base, change = torch.zeros(SHAPE), torch.randn(SHAPE, generator=draw)
    for method in METHODS:
        each = {"weight": [1.0], "density": [0.3]}
        merged = merge(method, base, [change], {"normalize": False}, each, size=640)
        assert float(merged.abs().sum()) == pytest.approx(float(change.abs().sum()), rel=1e-5)
        assert 0.15 < float((merged != 0).double().mean()) < 0.45
