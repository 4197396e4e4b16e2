"""WaveFT against PEFT, in float64 and by the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import WaveFTConfig
from peft.tuners.waveft.wavelet import Wavelet
from torch import nn

from tests.oracle.methods import Case, Turned, refusal
from weft.core.blocks import BLOCK, STRIP
from weft.deltas._wavelets import high_pass, low_pass
from weft.formats.adapters._peft_methods import waveft

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LAYERS = ["linear", "square", "wide"]
CONFIG = WaveFTConfig(target_modules=LAYERS, n_frequency=50)
TURNED = ["c_fc", "c_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"n_frequency": 50},
        *({"n_frequency": 200, "wavelet_family": name} for name in ("db2", "db7", "sym5", "coif2")),
        {"n_frequency": 50, "use_idwt": False, "wavelet_family": "db30"},
        {"n_frequency": 90, "random_loc_seed": 3, "scaling": 10},
        {"n_frequency": 7, "n_frequency_pattern": {"square": 36 * 36, "wide": 1}},
        {"n_frequency": 50, "proportional_parameters": True},
        {"n_frequency": 50, "bias": "waveft_only"},
    ],
    ids=str,
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    Case(WaveFTConfig(target_modules=LAYERS, **options), dtype).run(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"wavelet_family": "db3"}, {"use_idwt": False}], ids=str)
def test_stored_transposed(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    config = WaveFTConfig(
        target_modules=TURNED, n_frequency=100, fan_in_fan_out=True, scaling=3, **options
    )
    Case(config, dtype, model=Turned).run(tmp_path)


class Odd(nn.Module):
    """Sizes that the transform makes even."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 23)
        self.linear = nn.Linear(23, 36)
        self.wide = nn.Linear(36, 35)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.wide(self.linear(self.embed(tokens)).tanh())
        return out


@pytest.mark.parametrize("family", ["db1", "db4", "coif1"])
def test_odd_sizes(tmp_path: Path, family: str) -> None:
    config = WaveFTConfig(
        target_modules=["linear", "wide"], n_frequency=300, wavelet_family=family, scaling=3
    )
    Case(config, model=Odd).run(tmp_path)


@pytest.mark.parametrize("options", [{"wavelet_family": "sym4"}, {"use_idwt": False}], ids=str)
def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    Case(WaveFTConfig(target_modules=LAYERS, n_frequency=300, **options)).run(tmp_path)


@pytest.mark.parametrize("family", sorted(waveft._FAMILIES))
def test_filters(family: str) -> None:
    """They are those of PEFT, and orthonormal to their own shifts by two."""
    low = low_pass(family)
    assert low == pytest.approx(Wavelet(family).rec_lo, abs=1e-11)
    assert high_pass(low) == pytest.approx(Wavelet(family).rec_hi, abs=1e-11)
    for shift in range(0, len(low), 2):
        product = sum(a * b for a, b in zip(low, low[shift:], strict=False))
        assert product == pytest.approx(float(shift == 0), abs=1e-11)


@pytest.mark.parametrize("family", ["coif4", "coif5"])
def test_filters_that_are_wrong_in_peft(tmp_path: Path, family: str) -> None:
    low = Wavelet(family).rec_lo
    assert abs(sum(value**2 for value in low) - 1) > 0.01 or len(low) != 30
    message = f"a filter for {family} that is not a wavelet's"
    assert message in refusal(CONFIG, tmp_path, wavelet_family=family)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((50, 1), "do not belong together"),
        ((51,), "has n_frequency 51, and adapter_config.json says"),
    ],
)
def test_wrong_shape(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    change = {"base_model.model.wide.waveft_spectrum": torch.ones(shape)}
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert "wide" in error
    assert message in error
    assert "adapter_model.safetensors" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling": None}, "scaling = None, and must be a number"),
        ({"wavelet_family": "db11"}, "wavelet_family 'db11' is not one that PEFT can train with"),
        ({"wavelet_family": ["db1"]}, "wavelet_family = ['db1'], and must be a string"),
        ({"use_idwt": "no"}, "use_idwt = 'no', and must be true or false"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in refusal(CONFIG, tmp_path, **change)
