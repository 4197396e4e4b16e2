"""`--rank auto` on merged adapters whose weakest direction is hardly above the noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pairs
import pytest
import torch

from weft.execute import extraction

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

RANKS = (1, 4, 8, 16)


def mean_square_ulp(W: Tensor) -> float:
    """Of weights in bfloat16, whose numbers are 2⁻⁷ of their power of two apart."""
    ulp = torch.ldexp(torch.ones_like(W.double()), torch.frexp(W.double())[1] - 8)
    return float(ulp[W != 0].square().sum()) / W.numel()


def singular_values(W: Tensor, rank: int, times: float, ulps: float) -> Tensor:
    """The least is `times` σₙ (√m + √n), and the root mean square of ΔW so many `ulps`, or more.

    `W` (m, n) is bfloat16, and σₙ² = mean(ulp²) / 12. The values fall to the least by one ratio.
    """
    m, n = W.shape
    square = mean_square_ulp(W)
    least = times * math.sqrt(square / 12) * (math.sqrt(m) + math.sqrt(n))
    low, high = 1.0, 1e4
    for _ in range(50):
        middle = math.sqrt(low * high)
        norm = least * torch.logspace(math.log10(middle), 0, rank).norm() / math.sqrt(m * n)
        low, high = (middle, high) if norm < ulps * math.sqrt(square) else (low, middle)
    return least * torch.logspace(math.log10(high), 0, rank, dtype=torch.float64)


def found(root: Path, rank: int, times: float, ulps: float) -> list[int]:
    """What auto says of the ranks of ten matrices."""
    return of_matrices(root, pairs.weights(torch.bfloat16), rank, times, ulps)


def of_matrices(
    root: Path, base: dict[str, Tensor], rank: int, times: float, ulps: float
) -> list[int]:
    """The same of those of `base`."""
    tuned = dict(base)
    for number, (name, W) in enumerate(base.items()):
        if W.dim() == 2:
            generator = torch.Generator().manual_seed(1000 + number)
            U, V = (
                torch.linalg.qr(torch.randn(side, rank, generator=generator).double())[0]
                for side in W.shape
            )
            values = singular_values(W, rank, times, ulps)
            tuned[name] = (W.double() + (U * values) @ V.T).bfloat16()
    pairs.write(root / "base", base)
    pairs.write(root / "tuned", tuned)
    _, manifest = pairs.extract(root, rank="auto")
    assert not manifest["left_out"]
    return [module["rank"] for module in manifest["modules"].values()]


@pytest.mark.parametrize("times", [1.1, 1.5, 3])
@pytest.mark.parametrize("ulps", [0, 0.2, 0.5, 2, 8])
def test_the_rank_of_every_adapter_above_the_edge_is_found(
    tmp_path: Path, times: float, ulps: float
) -> None:
    """With `ulps` 0 all its singular values are one, which is the least update of that rank."""
    right = [
        each == rank for rank in RANKS for each in found(tmp_path / str(rank), rank, times, ulps)
    ]
    assert len(right) == 40
    assert sum(right) >= 0.95 * len(right)


def test_of_one_below_the_edge_not_more_is_found(tmp_path: Path) -> None:
    """At a third of the edge nothing is left of the weak directions; that is no reason for more."""
    assert max(found(tmp_path, 8, 0.3, 0.5)) <= 8


def test_a_large_matrix_whose_update_is_steep(tmp_path: Path) -> None:
    """The rounding of such an update has structure, and values of its own above the edge."""
    generator = torch.Generator().manual_seed(0)
    W = (0.02 * torch.randn(768, 768, generator=generator)).bfloat16()
    assert of_matrices(tmp_path, {"model.layers.0.self_attn.q_proj.weight": W}, 1, 1.1, 2) == [1]


def test_a_matrix_that_is_not_held_is_scored_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every product again, to the same ranks."""
    held = found(tmp_path / "held", 4, 1.1, 0.2)
    monkeypatch.setattr(extraction, "HELD", 0)
    assert found(tmp_path / "streamed", 4, 1.1, 0.2) == held == [4] * 10


def test_of_one_weight_that_changed_the_rank_is_one(tmp_path: Path) -> None:
    """It is explained to the last ulp, and no noise is left to compare with."""
    base = pairs.weights(torch.bfloat16)
    tuned = {name: W.clone() for name, W in base.items()}
    for W in tuned.values():
        if W.dim() == 2:
            W[3, 5] += 0.01
    pairs.write(tmp_path / "base", base)
    pairs.write(tmp_path / "tuned", tuned)
    _, manifest = pairs.extract(tmp_path, rank="auto")
    assert [module["rank"] for module in manifest["modules"].values()] == [1] * 10
