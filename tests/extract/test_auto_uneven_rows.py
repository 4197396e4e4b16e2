"""`--rank auto` where the rows or the columns of the weights differ in size, as in real models."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pairs
import pytest
import torch

from weft.execute import extraction

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Generator, Tensor

# rows, columns, rank
MATRICES = ((256, 384, 1), (384, 256, 2), (512, 256, 4), (256, 640, 8), (320, 320, 16))
LARGE = (1024, 1024, 4)
FAMILIES = (
    ("thrice", "even"),
    ("twenty times", "even"),
    ("log-normal", "even"),
    ("even", "log-normal"),
    ("log-normal", "log-normal"),
)
# The least singular value of the update in units of the even noise's edge. At the smallest one the
# update is far below an ulp, at the largest many ulps.
TIMES = (1.2, 3, 20, 200)


def spread(kind: str, count: int, generator: Generator) -> Tensor:
    """Of the rows, or of the columns."""
    if kind == "log-normal":
        return (0.7 * torch.randn(count, generator=generator)).exp().double()
    found = torch.ones(count, dtype=torch.float64)
    some = torch.randperm(count, generator=generator)[: max(2, count * 11 // 1024)]
    found[some] = {"thrice": 3.0, "twenty times": 20.0, "even": 1.0}[kind]
    return found


def weights(shape: tuple[int, int], rows: str, columns: str, generator: Generator) -> Tensor:
    W = 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)
    W *= spread(rows, shape[0], generator)[:, None] * spread(columns, shape[1], generator)
    return W.bfloat16()


def factors(shape: tuple[int, int], rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """B (m, k) and A (n, k) of an update B @ Aᵀ."""
    B, A = (torch.randn(side, rank, generator=generator).double() for side in shape)
    return B, A


def least_over_edge(W: Tensor, B: Tensor, A: Tensor) -> float:
    """The least singular value of B @ Aᵀ, where rows and columns have the same noise, by its edge.

    Sinkhorn's iteration, to its end, on ulp² / 12 of weights in bfloat16.
    """
    v = torch.ldexp(torch.ones_like(W.double()), torch.frexp(W.double())[1] - 8).square() / 12
    a, b = torch.ones(len(v)).double(), torch.ones(v.shape[1]).double()
    for _ in range(10):
        a = v.shape[1] / (v @ b)
        b = len(v) / (v.T @ a)
    left, right = (
        torch.linalg.qr(side.sqrt()[:, None] * factor)[1] for side, factor in ((a, B), (b, A))
    )
    least = float(torch.linalg.svdvals(left @ right.T)[-1])
    return least / sum(math.sqrt(side) for side in W.shape)


def found(root: Path, made: list[tuple[Tensor, Tensor]]) -> list[int]:
    """The ranks that auto finds for (base, tuned)."""
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(len(made))]
    pairs.write(root / "base", {n: base for n, (base, _) in zip(names, made, strict=True)})
    pairs.write(root / "tuned", {n: tuned for n, (_, tuned) in zip(names, made, strict=True)})
    _, manifest = pairs.extract(root, rank="auto")
    return [manifest["modules"].get(name, {"rank": 0})["rank"] for name in names]


def above_the_edge(rows: str, columns: str) -> list[tuple[int, Tensor, Tensor]]:
    """Rank, base and tuned of updates whose least value is so many `TIMES` the edge."""
    made = []
    for number, (m, n, rank) in enumerate((*MATRICES, LARGE)):
        generator = torch.Generator().manual_seed(number)
        for times in TIMES if (m, n, rank) != LARGE else TIMES[-1:]:
            W = weights((m, n), rows, columns, generator)
            B, A = factors((m, n), rank, generator)
            B *= times / least_over_edge(W, B, A)
            made.append((rank, W, (W.double() + B @ A.T).bfloat16()))
    return made


def test_the_rank_of_an_adapter_above_the_edge_of_even_noise_is_found(tmp_path: Path) -> None:
    """Of 95 % at least of all; with one edge for all rows it was that of 65 of the 105."""
    right = []
    for rows, columns in FAMILIES:
        made = above_the_edge(rows, columns)
        ranks = found(tmp_path / f"{rows}, {columns}", [pair for _, *pair in made])
        right += [rank == own for rank, (own, *_) in zip(ranks, made, strict=True)]
    assert len(right) == 105
    assert sum(right) >= 0.95 * len(right)


def test_the_rank_of_an_update_larger_than_the_weights_is_found(tmp_path: Path) -> None:
    """The rows and columns of the tuned weights differ in size then, and so does their rounding."""
    made = []
    for number, (m, n, rank) in enumerate((*MATRICES, LARGE)):
        generator = torch.Generator().manual_seed(number)
        W = weights((m, n), "even", "even", generator)
        B, A = factors((m, n), rank, generator)
        update = B @ A.T
        update *= 1.83 * W.double().norm() / update.norm()
        made.append((W, (W.double() + update).bfloat16()))
    assert found(tmp_path, made) == [1, 2, 4, 8, 16, 4]


@pytest.mark.parametrize("held", [True, False])
def test_a_direction_below_the_noise_of_large_rows_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """The best approximation of ΔW of the same rank has noise in its place."""
    if not held:
        monkeypatch.setattr(extraction, "HELD", 0)
    generator = torch.Generator().manual_seed(0)
    W = weights((384, 320), "twenty times", "even", generator)
    U, V = (torch.linalg.qr(factor)[0] for factor in factors((384, 320), 3, generator))
    sizes = torch.tensor([300.0, 200, 1]).double()
    sizes *= 3 / least_over_edge(W, U * sizes, V)
    update = U * sizes @ V.T
    tuned = (W.double() + update).bfloat16()
    assert found(tmp_path, [(W, tuned)]) == [3]
    ((name, taken),) = pairs.delta_of(tmp_path / "adapter").items()
    assert float(U[:, 2] @ taken @ V[:, 2]) == pytest.approx(float(sizes[2]), rel=0.1)
    D = tuned.double() - W.double()
    left, values, right = torch.linalg.svd(D)
    best = left[:, :3] * values[:3] @ right[:3]
    assert abs(float(U[:, 2] @ best @ V[:, 2])) < 0.1 * float(sizes[2])
    manifest = json.loads((tmp_path / "adapter" / "weft.json").read_text())
    module = manifest["modules"][name]
    assert module["relative_error"] == pytest.approx(float((D - taken).norm() / D.norm()), rel=1e-3)
    assert module["noise"]["fits"]
    assert module["noise"]["rank_above"] == 3
    assert not manifest["warnings"]
