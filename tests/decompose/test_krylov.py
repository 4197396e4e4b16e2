"""The truncated SVD, against LAPACK's in float64 of the same matrix."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.decompose import krylov, matrices
from weft.decompose.krylov import ROUNDING, key_of, svd_until, truncated_svd
from weft.decompose.matrices import Dense, Turned

if TYPE_CHECKING:
    from torch import Tensor

    from weft.decompose.krylov import Svd


def with_spectrum(rows: int, columns: int, values: np.ndarray, seed: int = 0) -> Tensor:
    """A matrix of these singular values, between random orthonormal bases."""
    numbers = np.random.default_rng(seed)
    count = len(values)
    left = np.linalg.qr(numbers.standard_normal((rows, count)))[0]
    right = np.linalg.qr(numbers.standard_normal((columns, count)))[0]
    return torch.from_numpy((left * values) @ right.T).float()


def noise(rows: int, columns: int, rank: int = 0, seed: int = 0) -> Tensor:
    """Gaussian noise with a signal of `rank` that stands out of it."""
    numbers = np.random.default_rng(seed)
    found = 0.02 * numbers.standard_normal((rows, columns))
    found += 0.02 * numbers.standard_normal((rows, rank)) @ numbers.standard_normal((rank, columns))
    return torch.from_numpy(found).float()


def falling(count: int) -> np.ndarray:
    return np.arange(1, count + 1, dtype=np.float64)


MATRICES = {
    "flat noise": lambda: noise(420, 300),
    "wide noise": lambda: noise(200, 900),
    "noise and signal": lambda: noise(300, 400, rank=12),
    "slow decay": lambda: with_spectrum(350, 300, falling(300) ** -0.5),
    "fast decay": lambda: with_spectrum(300, 350, 0.8 ** falling(300)),
    "low rank": lambda: with_spectrum(400, 300, 2.0 - falling(20) / 20),
    "repeated": lambda: with_spectrum(300, 300, np.where(falling(300) < 30, 1.2, 1.0)),
    "all equal": lambda: with_spectrum(300, 300, np.ones(300)),
    "tall": lambda: noise(3000, 140, rank=4),
    "one row": lambda: noise(1, 700),
    "one column": lambda: noise(700, 1),
    "small": lambda: noise(24, 40, rank=3),
    "far apart": lambda: with_spectrum(300, 300, 10.0 ** -falling(300).clip(max=9)),
}


def true_error(A: Tensor, found: Svd) -> float:
    product = (found.left.double() * found.values) @ found.right.double().T
    return float((A.double() - product).norm())


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("start", ["random", "rough"])
def test_error_is_within_the_tolerance_of_the_optimum_and_truly_stated(
    name: str, rank: int, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "multiplies_bfloat16", lambda device: start == "rough")
    A = MATRICES[name]()
    values = np.linalg.svd(A.double().numpy(), compute_uv=False)
    size = math.sqrt(float((values**2).sum()))
    best = math.sqrt(float((values[rank:] ** 2).sum()))
    found = truncated_svd(Dense(A), rank, key=key_of(0, name))
    error = true_error(A, found)
    assert error <= 1.002 * best + ROUNDING * size
    assert math.sqrt(found.error) == pytest.approx(error, rel=1e-5, abs=ROUNDING * size)
    assert error <= found.bound * best + 2 * ROUNDING * size
    for X in (found.left, found.right):
        own = X.double().T @ X.double() - torch.eye(found.rank)
        own *= torch.minimum(found.values, found.values[:, None])
        assert float(own.abs().max()) < 1e-5 * float(found.values[0])  # float32's, of the whole
    assert found.energy == pytest.approx(size**2, rel=1e-6)


def test_iteration_was_what_was_tested() -> None:
    """Small matrices are factorised in full: those above are not all small."""
    iterated = [name for name in MATRICES if not truncated_svd(Dense(MATRICES[name]()), 4).exact]
    assert len(iterated) >= 9


def test_flat_noise_is_proved_to_the_tolerance() -> None:
    found = truncated_svd(Dense(noise(700, 600, seed=3)), 32)
    assert not found.exact
    assert 1 < found.bound <= 1.002


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(130, 260),
    columns=st.integers(130, 260),
    rank=st.integers(1, 10),
    power=st.floats(0, 3),
    signal=st.integers(0, 12),
    seed=st.integers(0, 1000),
)
def test_bound_is_never_below_the_truth(
    rows: int, columns: int, rank: int, power: float, signal: int, seed: int
) -> None:
    count = min(rows, columns)
    values = falling(count) ** -power
    values[:signal] += 3
    A = with_spectrum(rows, columns, values, seed)
    exact = np.linalg.svd(A.double().numpy(), compute_uv=False)
    size = float(np.linalg.norm(exact))
    found = truncated_svd(Dense(A), rank, key=seed, tolerance=1.05)
    for cut in {1, rank}:
        part = found.cut(cut)
        best = float(np.linalg.norm(exact[cut:]))
        assert true_error(A, part) <= part.bound * best * (1 + 1e-6) + 2 * ROUNDING * size
        assert math.sqrt(part.error) == pytest.approx(
            true_error(A, part), rel=1e-5, abs=ROUNDING * size
        )


@pytest.mark.parametrize("left", [1e-2, 1e-3, 1e-4, 3e-5, 1e-5, 3e-6, 1.5e-6])
@pytest.mark.parametrize("start", ["random", "rough"])
def test_bound_where_next_to_nothing_is_left(
    left: float, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What float32 rounds off is not proved away."""
    monkeypatch.setattr(matrices, "multiplies_bfloat16", lambda device: start == "rough")
    for seed in range(4):
        tail = left * np.linspace(1, 0.9, 192) / math.sqrt(192)
        A = with_spectrum(220, 200, np.r_[np.full(8, 1 / math.sqrt(8)), tail], seed)
        best = float(np.linalg.norm(np.linalg.svd(A.double().numpy(), compute_uv=False)[8:]))
        found = truncated_svd(Dense(A), 8, key=seed)
        assert not found.exact
        assert true_error(A, found) <= found.bound * best


@pytest.mark.parametrize("left", [1e-1, 1e-2, 3e-3, 1e-3])
@pytest.mark.parametrize("start", ["random", "rough"])
def test_bound_of_noise_behind_a_strong_head(
    left: float, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank is more than the head has: directions of the noise count, all alike."""
    monkeypatch.setattr(matrices, "multiplies_bfloat16", lambda device: start == "rough")
    noisy = noise(1000, 1000, seed=9)
    head = with_spectrum(1000, 1000, np.r_[np.ones(5), np.zeros(995)])
    A = head / head.norm() + left * noisy / noisy.norm()
    best = float(np.linalg.norm(np.linalg.svd(A.double().numpy(), compute_uv=False)[8:]))
    found = truncated_svd(Dense(A), 8)
    assert not found.exact
    assert true_error(A, found) <= min(found.bound, 1.002) * best


def test_probes_beside_the_first_block_see_what_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are multiplied with it, and are no part of it."""
    monkeypatch.setattr(matrices, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(krylov, "_MOST_BLOCKS", 1)
    values = np.r_[np.full(8, 2.5), np.full(60, 2.0), 0.3 * np.ones(132)]
    A = with_spectrum(220, 200, values)
    V = torch.linalg.svd(A)[2].T
    missed = {
        "nothing": V[:, :48],
        "the first": V[:, 1:49],
        "the last": V[:, [*range(7), *range(8, 49)]],
    }
    for what, basis in missed.items():
        monkeypatch.setattr(krylov, "directions", lambda *_, basis=basis: basis.contiguous())
        found = truncated_svd(Dense(A), 8)
        best = float(np.linalg.norm(values[8:]))
        error = true_error(A, found)
        assert (error > 1.002 * best) == (what != "nothing")
        assert error <= found.bound * best


def test_proof_fails_where_the_iteration_missed_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that is orthogonal to the first singular vector: the probes see what it cannot."""
    # Products in bfloat16 are rounded: they see it too.
    monkeypatch.setattr(matrices, "multiplies_bfloat16", lambda device: False)
    values = np.r_[2.5, np.full(20, 2.0), 0.3 * np.ones(179)]
    A = with_spectrum(220, 200, values)
    top = torch.linalg.svd(A)[2][0]
    honest = krylov.gaussian

    def blind(count: int, columns: int, key: int, dtype: torch.dtype) -> Tensor:
        G = honest(count, columns, key, dtype)
        return G - torch.outer(top, top @ G)

    monkeypatch.setattr(krylov, "gaussian", blind)
    monkeypatch.setattr(krylov, "_MOST_BLOCKS", 2)
    found = truncated_svd(Dense(A), 3)
    best = float(np.linalg.norm(values[3:]))
    assert true_error(A, found) > 1.01 * best  # or else the test shows nothing
    assert true_error(A, found) <= found.bound * best


def test_same_bits_whatever_other_threads_do() -> None:
    A, B = noise(400, 300, rank=5), noise(300, 500)
    alone = truncated_svd(Dense(A), 8, key=7)
    together: dict[int, Svd] = {}

    def work(number: int) -> None:
        truncated_svd(Dense(B), 8, key=number)
        together[number] = truncated_svd(Dense(A), 8, key=7)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in together.values():
        assert torch.equal(found.left, alone.left)
        assert torch.equal(found.values, alone.values)
        assert torch.equal(found.right, alone.right)
    other = truncated_svd(Dense(A), 8, key=8)
    assert not torch.equal(other.left, alone.left)


def test_key_is_of_seed_and_name_alone() -> None:
    assert key_of(0, "a.b") == key_of(0, "a.b")
    assert len({key_of(0, "a.b"), key_of(1, "a.b"), key_of(0, "a.c")}) == 3
    assert 0 <= key_of(5, "x") < 2**128


def test_zero_matrix_has_zero_factors() -> None:
    found = truncated_svd(Dense(torch.zeros(200, 300)), 4)
    assert (found.left.shape, found.right.shape) == ((200, 4), (300, 4))
    assert (found.error, found.relative_error, found.kept, found.bound) == (0, 0, 1, 1)
    assert not found.values.any()


def test_rank_zero_keeps_nothing() -> None:
    A = noise(200, 150)
    found = truncated_svd(Dense(A), 0)
    assert found.rank == 0
    assert found.error == pytest.approx(float(A.double().square().sum()))


def test_rank_beyond_the_shape_is_all_of_it() -> None:
    A = noise(30, 50)
    found = truncated_svd(Dense(A), 64)
    assert found.rank == 30
    assert true_error(A, found) < 1e-5 * float(A.norm())


def test_transposed_matrix_has_the_factors_exchanged() -> None:
    A = with_spectrum(400, 300, 0.7 ** falling(300))
    found, turned = truncated_svd(Dense(A), 6), truncated_svd(Dense(A.T.contiguous()), 6)
    assert torch.allclose(found.values, turned.values, rtol=1e-5)
    assert true_error(A.T, turned) == pytest.approx(true_error(A, found), rel=1e-3)
    with pytest.raises(NotImplementedError):
        list(Turned(Dense(A)).rows())


def test_until_doubles_the_rank() -> None:
    A = noise(500, 400, rank=20)
    asked: list[int] = []

    def enough(found: Svd) -> int | None:
        asked.append(found.rank)
        values = found.values.tolist()
        above = sum(value > 2 for value in values)
        return above if above < len(values) else None

    found = svd_until(Dense(A), enough, start=8)
    assert asked == [8, 16, 32]
    assert found.rank == 20


def test_a_matrix_in_blocks_is_not_taken_whole() -> None:
    """A tall one is never asked for all its rows at once, nor turned."""
    A = noise(5000, 140, rank=3)

    class Blocks(Dense):
        largest = 0

        def rows(self):  # type: ignore[no-untyped-def]
            for start in range(0, 5000, 500):
                Blocks.largest = max(Blocks.largest, 500)
                yield start, self.values[start : start + 500]

    whole = truncated_svd(Dense(A), 60)
    found = truncated_svd(Blocks(A), 60)
    assert found.exact
    assert Blocks.largest == 500
    assert torch.allclose(found.values, whole.values)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e60])
def test_numbers_whose_squares_leave_float32(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "multiplies_bfloat16", lambda device: True)
    A = noise(200, 150, rank=4)
    A = A * size if size < 1e38 else A.double() * size
    values = np.linalg.svd(A.double().numpy(), compute_uv=False)
    best = math.sqrt(float((values[6:] ** 2).sum()))
    found = truncated_svd(Dense(A), 6)
    assert not found.exact
    assert true_error(A, found) <= 1.002 * best
    assert math.sqrt(found.error) == pytest.approx(true_error(A, found), rel=1e-5)
    assert found.energy == pytest.approx(float((values**2).sum()), rel=1e-12)
    np.testing.assert_allclose(found.values[:4], values[:4], rtol=1e-5)


def test_a_rough_start_is_not_believed_where_float32_cannot_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matrices, "multiplies_bfloat16", lambda device: True)
    A = 1e-3 * noise(512, 384) / 0.02
    A[0, 0] = 1e6
    values = np.linalg.svd(A.double().numpy(), compute_uv=False)
    found = truncated_svd(Dense(A), 16)
    best = math.sqrt(float((values[found.rank :] ** 2).sum()))
    assert true_error(A, found) <= 1.1 * best + ROUNDING * values[0]
