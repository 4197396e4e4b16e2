"""HRA against PEFT, in float64 and by the forward pass.

Not bit by bit: PEFT multiplies W by the product of all reflections, in (in)² values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import HRAConfig

from tests.oracle.methods import Case, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide", "conv2", "point"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("orthogonal", [False, True], ids=["plain", "gram-schmidt"])
@pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT:UserWarning")
def test_merges(tmp_path: Path, dtype: torch.dtype, rank: int, orthogonal: bool) -> None:
    config = HRAConfig(r=rank, apply_GS=orthogonal, target_modules=LAYERS)
    Case(config, dtype).run(tmp_path)


def test_refuses(tmp_path: Path) -> None:
    config = HRAConfig(r=4, target_modules=LAYERS)
    key = "base_model.model.square.hra_u"
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(35, 4)}))
    assert "square.weight is [36, 36]" in message
    assert "square.hra_u [35, 4]" in message
    assert "has rank 4, and" in refusal(config, tmp_path / "rank", r=5)
    message = refusal(config, tmp_path / "flat", lambda t: t.update({key: torch.ones(144)}))
    assert "hra_u [144]" in message
    other = "base_model.model.square.hra_v"
    message = refusal(config, tmp_path / "more", lambda t: t.update({other: torch.ones(36, 4)}))
    assert other in message
    zero = torch.zeros(36, 4)
    message = refusal(config, tmp_path / "zero", lambda t: t.update({key: zero}))
    assert "square.weight is NaN" in message
    # Columns in equal pairs: what PEFT makes orthogonal there is rounding noise.
    message = refusal(config, tmp_path / "pairs", apply_GS=True)
    assert "depend on each other" in message
