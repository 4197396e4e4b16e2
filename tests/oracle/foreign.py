"""Adapters of other tools, written by hand, and what those tools' formulas make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from helpers import Exact, check_rounding, gamma, load, same_bytes, save_base, weft_merge

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from tests.oracle.conftest import Lab


def base_of(lab: Lab, model: str, dtype: str) -> Path:
    """A tiny base, made once."""
    return lab.make(f"base-{model}-{dtype}", lambda folder: save_base(model, dtype, folder))


def normal(*shape: int, seed: int = 0, scale: float = 0.15) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def added(W: Tensor, left: Tensor, right: Tensor, scaling: float) -> Exact:
    """W + scaling · left @ right; W (rows, columns), `left` (rows, r), `right` (r, columns)."""
    left, right = left.double(), right.double()
    product = scaling * (left @ right)
    size = abs(scaling) * (left.abs() @ right.abs())
    rank = left.shape[1]
    return Exact(W.double() + product, gamma(rank + 2) * size + gamma(3) * product.abs())


def normed(V: Exact, m: Tensor) -> Exact:
    """M / ‖V‖ · V, a norm and a magnitude per row."""
    value = (m.double() / V.value.norm(dim=1))[:, None] * V.value
    # Beside the slack of V: what a norm over so many columns and two products may add.
    return Exact(value, 2 * V.slack + gamma(V.value.shape[1] + 8) * value.abs())


def check(
    base: Path, adapter: Path, out: Path, wanted: Mapping[str, Exact], **options: object
) -> None:
    """Merge: `wanted` has each changed tensor, and every other one is the base's to the bit."""
    weft_merge(base, adapter, out, **options)
    before, after = load(base), load(out)
    assert before.keys() == after.keys()
    assert wanted, "nothing would change: the test would show nothing"
    for name, value in after.items():
        if name in wanted:
            check_rounding(value, wanted[name], name)
            assert not same_bytes(value, before[name]), name
        else:
            assert same_bytes(value, before[name]), name
