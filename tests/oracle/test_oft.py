"""OFT against PEFT, in float64, by the forward pass and bit by bit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft import OFTConfig
from safetensors.torch import load_file, save_file
from torch import nn

import weft
from tests.oracle.methods import Case, noise, refusal
from weft.core.blocks import BLOCK, STRIP

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
            if name == "embed.weight":  # BLAS adds by shape and processor in another order
                torch.testing.assert_close(case.merged[name], theirs[name])
            else:
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


def test_of_0_15(tmp_path: Path) -> None:
    """What releases before it wrote is in `tests/corpus`."""
    Case(CONFIG).merge(tmp_path)
    without(tmp_path / "adapter", "use_cayley_neumann")
    with pytest.raises(weft.core.errors.Unsupported, match=r"OFT of PEFT 0\.14 and 0\.15") as error:
        weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "again")
    assert "0.15" in str(error.value.hint)


def test_nan(tmp_path: Path) -> None:
    key = "base_model.model.wide.oft_R.weight"
    error = refusal(CONFIG, tmp_path, lambda tensors: tensors[key].view(-1)[3].fill_(torch.nan))
    assert f"{key} in" in error
    assert "NaN or infinite" in error


@pytest.mark.parametrize("rows", [36, 38])
@pytest.mark.parametrize("options", [{}, {"coft": True, "eps": 1e-3}, {"block_share": True}])
def test_of_outputs_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, options: dict[str, Any]
) -> None:
    """PEFT up to 0.13: W′ = Dᵀ W, the last block of D being cut where 4 do not divide the rows."""
    generator = torch.Generator().manual_seed(0)
    size = -(-rows // 4)
    W = torch.randn(rows, 24, generator=generator)
    R = torch.randn(1 if options.get("block_share") else 4, size, size, generator=generator)
    for name, file, tensors, config in (
        ("base", "model", {"m.weight": W}, {"model_type": "toy"}),
        ("adapter", "adapter_model", {"base_model.model.m.oft_r": R},
         {"peft_type": "OFT", "r": 4, "target_modules": ["m"], "eps": 6e-5, **options}),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / f"{file}.safetensors", {"format": "pt"})
        path = "adapter_config.json" if name == "adapter" else "config.json"
        (tmp_path / name / path).write_text(json.dumps(config))
    if options.get("coft"):
        limit = 1e-3 * size**2 / 2
        R = R * (limit / R.flatten(1).norm(dim=1).clamp(min=limit))[:, None, None]
    S = (R - R.mT).double() / 2
    blocks = (torch.eye(size) - S) @ torch.linalg.inv(torch.eye(size) + S)
    D = torch.block_diag(*blocks.expand(4, -1, -1))[:rows, :rows]
    for out, block in (("whole", None), ("pieces", 1)):
        if block:
            monkeypatch.setitem(BLOCK, "cpu", block)
            monkeypatch.setitem(STRIP, "cpu", block)
        weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / out, threads=2)
        merged = load_file(tmp_path / out / "model.safetensors")["m.weight"]
        torch.testing.assert_close(merged.double(), D.T @ W.double(), rtol=1e-5, atol=1e-5)
