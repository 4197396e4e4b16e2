"""Why PSOFT is refused: PEFT's own merge depends on the signs that an SVD happens to give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peft
import torch
from peft import PsoftConfig

from tests.oracle.methods import Toy, noise, refusal

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = PsoftConfig(r=4, target_modules=["linear"])


def test_signs_count() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Toy(), CONFIG)
    noise(model)
    layer = model.base_model.model.linear
    A, B = layer._psoft_A_cache, layer._psoft_B_cache
    before, product = layer.get_delta_weight("default"), B["default"] @ A["default"]
    signs = torch.tensor([1.0, -1, 1, 1])
    A["default"], B["default"] = A["default"] * signs[:, None], B["default"] * signs
    after = layer.get_delta_weight("default")
    torch.testing.assert_close(B["default"] @ A["default"], product)  # as good an SVD of W
    assert (after - before).norm() > 0.1 * before.norm()


def test_refused(tmp_path: Path) -> None:
    message = refusal(CONFIG, tmp_path)
    assert (
        "is a PSOFT adapter, which cannot be merged: its directions are not in the file" in message
    )
