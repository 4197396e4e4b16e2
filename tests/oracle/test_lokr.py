"""LoKr against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from peft import LoKrConfig

from tests.oracle.methods import Case, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide", "conv1", "conv2", "point"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 2},
        {"r": 2, "decompose_both": True},
        {"r": 8},
        {"r": 2, "use_effective_conv2d": True},
        # Of rank 1, PEFT crashes on a Conv1d, in training already.
        {"r": 1, "use_effective_conv2d": True, "target_modules": ["linear", "conv2", "point"]},
        {"r": 2, "decompose_factor": 3, "init_weights": "lycoris"},
        {"r": 2, "rank_pattern": {"square": 3}, "alpha_pattern": {"linear": 5}},
    ],
    ids=[
        "plain",
        "both-decomposed",
        "full",
        "effective-conv1d",
        "effective-conv2d",
        "factor",
        "patterns",
    ],
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, object]) -> None:
    config = LoKrConfig(**{"alpha": 6, "target_modules": LAYERS, **options})  # type: ignore[arg-type]
    case = Case(config, dtype)
    case.run(tmp_path)
    if not options.get("use_effective_conv2d"):
        case.check_bits(tmp_path)


def test_refuses(tmp_path: Path) -> None:
    config = LoKrConfig(r=2, target_modules=LAYERS)
    key = "base_model.model.square.lokr_w2_a"
    assert "lacks lokr_w2_a" in refusal(config, tmp_path / "missing", lambda t: t.pop(key))
    message = refusal(config, tmp_path / "cut", lambda t: t.update({key: torch.ones(5, 2)}))
    assert "square.weight is [36, 36]" in message
    assert "square.lokr_w2_a [5, 2]" in message
    more = "base_model.model.square.lokr_w1_a"
    message = refusal(config, tmp_path / "more", lambda t: t.update({more: torch.ones(6, 2)}))
    assert f"{more} in " in message
    assert "has rank 2, and" in refusal(config, tmp_path / "rank", r=3)
    assert "init_weights = 'svd'" in refusal(config, tmp_path / "init", init_weights="svd")
