"""A method of PEFT on models small enough to try everything: what each of three oracles says.

`Case.merge` trains (random values), saves, and merges with Weft; then
- PEFT's own `merge_and_unload` in float32 says what every tensor is, bit by bit where it is right;
- the same in float64 (base and adapter widened first) says what the correctly rounded values are;
- the unmerged forward pass says what the adapter does, whatever PEFT's merge makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weft

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
    """One config of one method on `Toy`.

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
        base = self._base()
        (folder / "base").mkdir(parents=True)
        save_file(base.state_dict(), folder / "base" / "model.safetensors", {"format": "pt"})
        model = peft.get_peft_model(base, self.config)
        self.train(model)
        model.save_pretrained(folder / "adapter")
        weft.merge(folder / "base", folder / "adapter", output=folder / "merged")
        self.merged = load_file(folder / "merged" / "model.safetensors")
        exact = self.peft_merged(folder, torch.float64)
        original = load_file(folder / "base" / "model.safetensors")
        assert self.merged.keys() == exact.keys() == original.keys()
        changed = [n for n in exact if not torch.equal(exact[n], original[n].double())]
        assert changed, "the adapter does nothing: the test would show nothing"
        for name, value in self.merged.items():
            assert value.dtype == self.dtype
            if name not in changed:
                assert torch.equal(value, original[name]), name
            elif self.dtype == torch.float32:
                torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=self.atol)
            else:
                wrong = (value != exact[name].to(self.dtype)).float().mean()
                assert wrong <= 0.01, (name, float(wrong))
        if self.dtype == torch.float32:
            self.check_forward(folder)

    def check_forward(self, folder: Path) -> None:
        """The merged weights do what base + adapter do, and not what the base does."""
        plain = self._base().eval()
        with torch.no_grad():
            before = plain(self.inputs)
            unmerged = self._load(folder, torch.float32)(self.inputs)
            plain.load_state_dict(self.merged)
            after = plain(self.inputs)
        torch.testing.assert_close(after, unmerged, rtol=1e-4, atol=1e-4)
        assert (after - before).abs().max() > 1e-3

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
