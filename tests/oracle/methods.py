"""A method of PEFT on models small enough to try everything: what each of three oracles says.

`Case.merge` trains (random values), saves, and merges with Weft; then
- PEFT's own `merge_and_unload` in float32 says what every tensor is, bit by bit where it is right;
- the same in float64 (base and adapter widened first) says what the correctly rounded values are;
- the unmerged forward pass says what the adapter does, whatever PEFT's merge makes of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import weft
from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor


class Toy(nn.Module):
    """Every kind of layer that methods adapt; `linear` and `wide` are not square, `square` is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.linear = nn.Linear(24, 36)
        self.norm = nn.LayerNorm(36)
        self.square = nn.Linear(36, 36, bias=False)
        self.wide = nn.Linear(36, 48)
        self.conv1 = nn.Conv1d(48, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 16, (3, 3), padding=1)
        self.point = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8 * 12, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` (batch, 12) -> (batch, 10)."""
        hidden = self.norm(self.linear(self.embed(tokens)).tanh())
        hidden = self.wide(self.square(hidden).tanh()).tanh()
        hidden = self.conv1(hidden.transpose(1, 2)).tanh()
        hidden = self.conv2(hidden[..., None]).tanh()
        out: Tensor = self.head(self.point(hidden).flatten(1))
        return out


class Turned(nn.Module):
    """Layers of GPT-2, which stores (in, out); `c_proj` is square."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.h = nn.ModuleDict({"c_fc": Conv1D(36, 24), "c_proj": Conv1D(36, 36)})
        self.head = nn.Linear(36, 10)
        for layer in self.h.values():
            nn.init.normal_(layer.weight, std=0.2)
            nn.init.normal_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` (batch, 12) -> (batch, 12, 10)."""
        hidden = self.h["c_fc"](self.embed(tokens)).tanh()
        out: Tensor = self.head(self.h["c_proj"](hidden).tanh())
        return out


class Volume(nn.Module):
    """With a convolution in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.conv3 = nn.Conv3d(12, 8, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` (batch, 12) -> (batch, 8, 2, 3, 4)."""
        out: Tensor = self.conv3(self.embed(tokens).view(-1, 12, 2, 3, 4))
        return out


TOKENS = torch.arange(48).reshape(4, 12) % 40


def noise(model: nn.Module, seed: int = 1, scale: float = 0.1) -> None:
    """Every trainable value moves: a training run in no time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters(), key=lambda item: item[0]):
            if value.requires_grad:
                value.add_(scale * torch.randn(value.shape, generator=generator))


@dataclass
class Case:
    """One config of one method on one model.

    Attributes:
        config: A PEFT config.
        dtype: Of the base's weights.
        train: Changes the adapter's values.
        atol: Absolute, for values of about 1: what float32 arithmetic may add.
        model: What is adapted, if it is not `Toy`, and what it is given.
    """

    config: Any
    dtype: torch.dtype = torch.float32
    train: Callable[[nn.Module], None] = noise
    atol: float = 2e-6
    model: Callable[[], nn.Module] = Toy
    inputs: Tensor = field(default_factory=lambda: TOKENS)
    merged: dict[str, Tensor] = field(init=False)

    def run(self, folder: Path) -> None:
        """Train, save, merge, and hold the result against float64 and the forward pass."""
        self.merge(folder)
        self.check_values(folder)
        if self.dtype == torch.float32:
            self.check_forward(folder)

    def merge(self, folder: Path) -> None:
        """Train, save, merge."""
        base = self._base()
        (folder / "base").mkdir(parents=True)
        save_file(base.state_dict(), folder / "base" / "model.safetensors", {"format": "pt"})
        model = peft.get_peft_model(base, self.config)
        self.train(model)
        model.save_pretrained(folder / "adapter")
        weft.merge(folder / "base", folder / "adapter", output=folder / "merged")
        self.merged = load_file(folder / "merged" / "model.safetensors")

    def check_values(self, folder: Path) -> None:
        """PEFT's merge in float64, rounded once, is what was written; the rest is the base's."""
        exact = self.peft_merged(folder, torch.float64)
        original = load_file(folder / "base" / "model.safetensors")
        assert self.merged.keys() == exact.keys() == original.keys()
        changed = [n for n in exact if not torch.equal(exact[n], original[n].double())]
        assert changed, "the adapter does nothing: the test would show nothing"
        for name, value in self.merged.items():
            assert value.dtype == (self.dtype if value.is_floating_point() else torch.int64)
            if name not in changed or not value.is_floating_point():
                assert torch.equal(value, exact[name].to(value.dtype)), name
            elif self.dtype == torch.float32:
                torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=self.atol)
            else:
                wrong = (value != exact[name].to(self.dtype)).float().mean()
                assert wrong <= 0.01, (name, float(wrong))

    def check_bits(self, folder: Path, *, sums: bool = False) -> None:
        """PEFT's merge, as it is, has the same bits.

        With `sums` over inputs or outputs float32 may differ in the last: by the shape of a product
        and the processor BLAS adds in another order.
        """
        for name, value in self.peft_merged(folder).items():
            if sums and value.dtype == torch.float32:
                torch.testing.assert_close(self.merged[name], value, msg=name)
            else:
                assert torch.equal(self.merged[name], value), name

    def check_forward(self, folder: Path) -> None:
        """The merged weights do what base + adapter do, and not what the base does."""
        with torch.no_grad():
            before = self._base().eval()(self.inputs)
        after = self.forward(self.merged)
        torch.testing.assert_close(after, self.unmerged(folder), rtol=1e-4, atol=1e-4)
        assert (after - before).abs().max() > 1e-3

    def forward(self, weights: dict[str, Tensor]) -> Tensor:
        """What the model gives with these weights."""
        plain = self._base()
        plain.load_state_dict(weights)
        with torch.no_grad():
            out: Tensor = plain.eval()(self.inputs)
        return out

    def unmerged(self, folder: Path) -> Tensor:
        """What base + adapter give, without a merge."""
        with torch.no_grad():
            out: Tensor = self._load(folder, torch.float32)(self.inputs)
        return out

    def peft_merged(self, folder: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """PEFT's merge: as it is, or with everything widened to `dtype` first."""
        merged: dict[str, Tensor] = self._load(folder, dtype).merge_and_unload().state_dict()
        return merged

    def _base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().to(self.dtype)

    def _load(self, folder: Path, dtype: torch.dtype | None) -> Any:
        base = self._base()
        model = peft.PeftModel.from_pretrained(base.to(dtype or self.dtype), folder / "adapter")
        return (model.to(dtype) if dtype else model).eval()


def refusal(
    config: Any,
    folder: Path,
    edit: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    model: Callable[[], nn.Module] = Toy,
    **settings: Any,
) -> str:
    """Why Weft does not merge an adapter whose tensors `edit` has changed.

    `settings` are written into its config.
    """
    torch.manual_seed(0)
    base = model()
    (folder / "base").mkdir(parents=True)
    save_file(base.state_dict(), folder / "base" / "model.safetensors", {"format": "pt"})
    adapter = folder / "adapter"
    peft.get_peft_model(base, config).save_pretrained(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(WeftError) as error:
        weft.merge(folder / "base", adapter, output=folder / "merged")
    assert not (folder / "merged").exists()
    return str(error.value)
