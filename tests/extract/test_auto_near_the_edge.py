"""`--rank auto` on merged adapters whose weakest direction is hardly above the noise of rounding.

The guide states the limits that hold here, and one more: in matrices of 768 columns and more, where
one or two directions hold nearly all of ΔW, rounding has structure, and too many are found.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pairs
import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

RANKS = (4, 8, 16)


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
    base = pairs.weights(torch.bfloat16)
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


@pytest.mark.parametrize(
    ("times", "ulps"),
    [(1.1, 0.5), (1.1, 2), (1.5, 0.3), (2, 0.2)],
)
def test_of_so_large_an_update_the_rank_is_found(tmp_path: Path, times: float, ulps: float) -> None:
    right = [
        each == rank for rank in RANKS for each in found(tmp_path / str(rank), rank, times, ulps)
    ]
    assert len(right) == 30
    assert sum(right) >= 0.95 * len(right)


@pytest.mark.parametrize(("times", "ulps"), [(1.1, 0.2), (1.5, 0.1)])
def test_of_a_smaller_one_weak_directions_are_lost(
    tmp_path: Path, times: float, ulps: float
) -> None:
    """The limit that the guide states: of most matrices fewer are found, and of none more."""
    ranks = found(tmp_path, 8, times, ulps)
    assert max(ranks) <= 8
    assert sum(rank < 8 for rank in ranks) > 5
