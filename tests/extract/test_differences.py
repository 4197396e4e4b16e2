"""The pass over both models, by compiled loops and by torch, against float64."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from weft import native
from weft.api._models import Models, named
from weft.core.errors import NumericsError
from weft.core.wishes import wishes_of
from weft.decompose.even import Evening
from weft.execute._blocks import Files, Workspace
from weft.execute._differences import Difference
from weft.execute._expressions import Shared
from weft.plan.extract import plan_extract

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from weft.execute._differences import Sums

SHAPE = (700, 1024)  # more than a block
NAME = "model.layers.0.mlp.up_proj.weight"


def difference(root: Path, base: Tensor, tuned: Tensor) -> Difference:
    for name, weight in (("base", base), ("tuned", tuned)):
        (root / name).mkdir()
        save_file({NAME: weight}, root / name / "model.safetensors", {"format": "pt"})
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        (root / name / "config.json").write_text(json.dumps(config))
    models = Models(None)
    views = [models.view(named(str(root / name))) for name in ("tuned", "base")]
    (change,) = plan_extract(*views, wishes_of(rank=4), None).changes
    return Difference(change, Files(), Workspace(), Shared(1))


def taken(root: Path, base: Tensor, tuned: Tensor) -> tuple[Sums, Tensor, Tensor]:
    """The sums, the difference, and what it is in bfloat16."""
    source = difference(root, base, tuned)
    into, rough = torch.empty(SHAPE), torch.empty(SHAPE, dtype=torch.bfloat16)
    alone = source.sums(0, source.rows)
    found = source.sums(0, source.rows, into, rough=rough)
    assert (alone.energy, alone.tuned) == (found.energy, found.tuned)
    assert alone.noise == found.noise
    return found, into, rough


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
@pytest.mark.usefixtures("loops")
def test_sums_and_values(tmp_path: Path, ours: torch.dtype, theirs: torch.dtype) -> None:
    base = (0.02 * normal(0)).to(theirs)
    tuned = (base.float() + 1e-3 * normal(1)).to(ours)
    found, into, rough = taken(tmp_path, base, tuned)
    exact = tuned.double() - base.double()
    assert torch.equal(into, tuned.float() - base.float())
    assert torch.equal(rough, into.bfloat16())
    assert found.energy == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert found.tuned == pytest.approx(float(tuned.double().square().sum()), rel=1e-6)
    if ours == theirs:
        assert found.grid == str(ours).removeprefix("torch.")
        step = torch.finfo(ours).eps * 2 ** tuned.double().abs().log2().floor()
        assert found.noise.uniform == pytest.approx(float(step.square().mean() / 12), rel=0.02)


EDGES: dict[str, Any] = {
    "equal": lambda base: base.clone(),
    "minus zero": lambda base: torch.where(base == 0, -0.0, base),
    "one of the least": lambda base: torch.where(base == 0, 1e-38, base),
    "one element": lambda base: base.clone().index_put_(
        (torch.tensor(699), torch.tensor(1023)), one
    ),
    "opposite": lambda base: -base,
    "nearly nothing left": lambda base: (base.float() * 1e-4).to(base.dtype),
}
one = torch.tensor(1.0, dtype=torch.bfloat16)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.usefixtures("loops")
def test_edges(tmp_path: Path, edge: str) -> None:
    base = (0.02 * normal(0)).bfloat16()
    base[3, 5] = base[600, 7] = 0
    tuned = EDGES[edge](base)
    found, into, _ = taken(tmp_path, base, tuned)
    exact = tuned.double() - base.double()
    assert torch.equal(into, tuned.float() - base.float())
    assert found.energy == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert (found.energy > 0) == bool(exact.any())
    assert found.tuned == pytest.approx(float(tuned.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.usefixtures("loops")
def test_squares_that_float32_does_not_hold(tmp_path: Path, size: float, equal: bool) -> None:
    base = (size * normal(0)).bfloat16()
    tuned = base.clone() if equal else (size * normal(1)).bfloat16()
    found, _, _ = taken(tmp_path, base, tuned)
    exact = tuned.double() - base.double()
    assert found.energy == pytest.approx(float(exact.square().sum()), rel=1e-5)
    assert found.tuned == pytest.approx(float(tuned.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["base", "tuned"])
@pytest.mark.usefixtures("loops")
def test_what_is_not_finite_stops_it(tmp_path: Path, where: str, value: float) -> None:
    base, tuned = normal(0).bfloat16(), normal(1).bfloat16()
    (base if where == "base" else tuned)[500, 3] = value
    with pytest.raises(NumericsError, match=where):
        taken(tmp_path, base, tuned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_how_noise_is_spread_is_seen_by_loops_as_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    rows, columns = normal(2)[:, :1].exp(), normal(3)[:1].exp()
    base = (0.02 * rows * columns * normal(0)).to(dtype)
    tuned = (base.float() + 1e-3 * normal(1)).to(dtype)
    found = []
    for number, library in enumerate((native.library(), None)):
        monkeypatch.setattr(native, "library", lambda library=library: library)
        (tmp_path / str(number)).mkdir()
        source = difference(tmp_path / str(number), base, tuned)
        even = Evening(SHAPE[1], 1e-3)
        source.sums(0, source.rows, even=even)
        weights = even.weights()
        assert weights is not None
        found.append(weights)
    # Blocks are of another size, and so is what is known of the columns at a row.
    torch.testing.assert_close(found[0].rows, found[1].rows, rtol=0.01, atol=0)
    torch.testing.assert_close(found[0].columns, found[1].columns, rtol=0.01, atol=0)
    step = 2 ** tuned.double().abs().clamp_min(1e-30).log2().floor()
    v = (found[0].rows.double()[:, None] * step * found[0].columns.double()).square()
    for dimension in (0, 1):
        before, after = (each.mean(dimension) for each in (step.square(), v))
        assert float(after.std() / after.mean()) < 0.1 < float(before.std() / before.mean())
