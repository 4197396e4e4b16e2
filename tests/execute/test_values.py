"""What the arithmetic keeps: values beside far larger weights, and bytes that nothing changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import weft

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Folders
    from torch import Tensor

NAME = "layers.0.q_proj.weight"
LARGE = 1e8  # of which float32 knows no neighbour nearer than 8


def merge(folders: Folders, base: Path, adapters: list[Any]) -> Tensor:
    out = folders.root / "out"
    weft.merge(base, adapters, output=out)
    return load_file(out / "model.safetensors")[NAME]


def saved(folders: Folders, name: str, value: Tensor) -> Path:
    """An adapter that has the matrix trained in full."""
    return folders.adapter([], {NAME: value}, name=name, modules_to_save=["q_proj"])


def some(seed: int) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_two_heads_beside_large_weights(folders: Folders) -> None:
    """0.7 and 0.3 of two values are no part of W, however large that is."""
    one, other = some(1), some(2)
    adapters = [f"{saved(folders, 'one', one)}:0.7", f"{saved(folders, 'other', other)}:0.3"]
    merged = merge(folders, folders.base(tensors={NAME: LARGE * some(0)}), adapters)
    assert torch.allclose(merged, 0.7 * one + 0.3 * other, rtol=1e-6, atol=1e-6)


def test_a_head_with_another_adapter_on_top(folders: Folders) -> None:
    lora = folders.adapter(name="lora")
    factors = load_file(lora / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.layers.0.q_proj.lora_{part}.weight"] for part in "AB")
    value = some(1)
    base = folders.base(tensors={NAME: LARGE * some(0)})
    merged = merge(folders, base, [saved(folders, "head", value), lora])
    assert torch.allclose(merged, value + 2 * B @ A, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", [0.3, 0.7, 1.3])
def test_rows_that_were_not_trained_keep_their_bytes(weight: float, folders: Folders) -> None:
    """(1 − w) · W + w · W would be W but for its last bit."""
    W = some(0)
    tokens = {"layers.0.q_proj.token_adapter.trainable_tokens_delta": some(1)[:2]}
    adapter = folders.adapter([], tokens, trainable_token_indices={"q_proj": [5, 2]})
    merged = merge(folders, folders.base(tensors={NAME: W}), [f"{adapter}:{weight}"])
    rest = [0, 1, 3, 4, 6, 7]
    assert same_bytes(merged[rest], W[rest])
    expected = W[[5, 2]].double() * (1 - weight) + weight * some(1)[:2].double()
    assert torch.allclose(merged[[5, 2]].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", ["lora_A", "lora_B", "alpha", "weight"])
def test_what_changes_nothing_keeps_its_bytes(
    zero: str, dtype: torch.dtype, folders: Folders
) -> None:
    """−0 + 0 is +0: the base's zeros keep their sign."""
    W = some(0).to(dtype)
    W[::2, ::2] = -0.0
    adapter = folders.adapter()
    tensors = {
        name.removeprefix("base_model.model."): tensor * (f".{zero}." not in name)
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    alpha = 0 if zero == "alpha" else 4
    adapter = folders.adapter([], tensors, name="zero", lora_alpha=alpha)
    weight = 0 if zero == "weight" else 1
    merged = merge(folders, folders.base(tensors={NAME: W}), [f"{adapter}:{weight}"])
    assert same_bytes(merged, W)
