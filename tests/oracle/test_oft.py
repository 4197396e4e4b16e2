"""OFT against PEFT, in float64, by the forward pass and bit by bit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft import OFTConfig
from safetensors.torch import load_file
from torch import nn

import weft
from tests.oracle.methods import Case, noise, refusal

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = ["linear", "square", "wide", "point"]
BLOCKS = {"oft_block_size": 4}
CONFIG = OFTConfig(**BLOCKS, target_modules=LAYERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        BLOCKS,
        {"oft_block_size": 0, "r": 4},
        {**BLOCKS, "block_share": True},
        {**BLOCKS, "use_cayley_neumann": False},
        *({**BLOCKS, "num_cayley_neumann_terms": n} for n in (1, 2, 3, 4, 7)),
        {**BLOCKS, "coft": True, "eps": 0.3},
        {**BLOCKS, "coft": True, "eps": 0.3, "block_share": True, "use_cayley_neumann": False},
        {**BLOCKS, "target_modules": ["embed"]},
        {**BLOCKS, "bias": "oft_only"},
    ],
    ids=str,
)
def test_merges(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if options.get("num_cayley_neumann_terms") == 1:
        options = {**options, "bias": "oft_only"}  # R = I: something else must change
    case = Case(OFTConfig(**{"target_modules": LAYERS, **options}), dtype)
    case.run(tmp_path)
    theirs = case.peft_merged(tmp_path)
    if not options.get("coft"):  # whose norm PEFT takes over both triangles
        for name in ("linear.weight", "square.weight", "wide.weight", "embed.weight"):
            assert torch.equal(case.merged[name], theirs[name]), name


def without(adapter: Path, field: str) -> None:
    """As an older PEFT saved it."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    del config[field]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("terms", [2, 3, 5, 6])
def test_the_series_of_older_releases(tmp_path: Path, terms: int) -> None:
    """PEFT 0.16 and 0.17, which do not say their version, doubled the last power as well."""
    case = Case(OFTConfig(**BLOCKS, target_modules=["linear"], num_cayley_neumann_terms=terms))
    case.merge(tmp_path)
    without(tmp_path / "adapter", "peft_version")
    weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "again")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    upper = tensors["base_model.model.linear.oft_R.weight"].double()
    Q = torch.zeros(6, 4, 4, dtype=torch.float64)
    Q[:, *torch.triu_indices(4, 4, 1)] = upper
    Q = Q - Q.mT
    R = torch.eye(4) + sum(2 * torch.linalg.matrix_power(Q, n) for n in range(1, terms))
    W = load_file(tmp_path / "base" / "model.safetensors")["linear.weight"].double()
    want = W @ torch.block_diag(*R).T
    merged = load_file(tmp_path / "again" / "model.safetensors")["linear.weight"]
    torch.testing.assert_close(merged.double(), want, rtol=1e-5, atol=1e-6)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(image)
        return out


def test_convolution_with_a_kernel(tmp_path: Path) -> None:
    """PEFT's layer is another one than before even if R = I; its merge is not what was trained."""
    config = OFTConfig(**BLOCKS, target_modules=["conv"])
    model = Convolution()
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(image)
        wrapped = peft.get_peft_model(model, config).eval()
        untrained = wrapped(image)
        noise(wrapped)
        unmerged = wrapped(image)
        merged = wrapped.merge_and_unload()(image)
    assert (untrained - before).abs().max() > 1
    assert (merged - unmerged).abs().max() > 1
    error = refusal(config, tmp_path, model=Convolution)
    assert "conv.oft_R.weight" in error
    assert "overlapping patches of a convolution with kernel 3 × 3" in error


@pytest.mark.parametrize(
    ("key", "shape"),
    [("linear.oft_R.weight", (5, 6)), ("linear.oft_R.weight", (6, 7)), ("wide.oft_R.weight", (9,))],
)
def test_wrong_shape(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    change = {f"base_model.model.{key}": torch.ones(shape)}
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors.update(change))
    assert key.partition(".")[0] in error
    assert f"oft_R.weight {list(shape)}" in error
    assert "adapter_model.safetensors" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms = 0, and must be a whole"),
        ({"eps": "much"}, "eps = 'much', and must be a number"),
        ({"coft": 1}, "coft = 1, and must be true or false"),
        ({"use_new_idea": True}, "sets use_new_idea, a variant of OFT"),
    ],
)
def test_wrong_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in refusal(CONFIG, tmp_path, **change)


def test_before_0_16(tmp_path: Path) -> None:
    Case(CONFIG).merge(tmp_path)
    without(tmp_path / "adapter", "use_cayley_neumann")
    with pytest.raises(weft.core.errors.Unsupported, match=r"OFT of PEFT before 0\.16") as error:
        weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "again")
    assert "0.15" in str(error.value.hint)


def test_nan(tmp_path: Path) -> None:
    key = "base_model.model.wide.oft_R.weight"
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors[key].view(-1)[3].fill_(torch.nan))
    assert f"{key} in" in error
    assert "NaN or infinite" in error
