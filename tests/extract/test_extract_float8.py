"""`weft extract` and `weft diff` of float8 with scales, against float64 and transformers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import float8_models
import pairs
import pytest
import torch
from pairs import extract
from safetensors.torch import load_file

import weft
from weft.core.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FORMS = ["blocks", "tensor", "channel"]
O_PROJ = "model.layers.0.self_attn.o_proj.weight"  # (224, 224): no multiple of 128


def tuned_weights() -> dict[str, Tensor]:
    """Matrices moved by rank 6, norms and biases by noise."""
    found = {}
    for number, (name, W) in enumerate(pairs.weights(layers=1).items()):
        generator = torch.Generator().manual_seed(number)
        change = pairs.low_rank(6, 3e-3)(tuple(W.shape), generator)
        found[name] = W + (change if W.dim() == 2 else 1e-2 * torch.randn(W.shape))
    return found


def bf16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: W.bfloat16() for name, W in tensors.items()}


def differences(tuned: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: tuned[n].double() - base[n].double() for n in base}


def check(root: Path, want: dict[str, Tensor], rank: int = 400) -> dict[str, Any]:
    """Of full rank, the adapter holds ΔW to what float32 loses; -> its manifest."""
    adapter, manifest = extract(root, rank=rank, embed="lora")
    found = pairs.delta_of(adapter)
    matrices = {n: dW for n, dW in want.items() if dW.dim() == 2 and bool(dW.any())}
    assert found.keys() == matrices.keys()
    for name, dW in matrices.items():
        assert float((dW - found[name]).norm()) < 2e-5 * float(dW.norm()), name
        assert manifest["modules"][name]["norm"] == pytest.approx(float(dW.norm()), rel=1e-6)
    names = {*manifest["modules"], *manifest["saved"], *manifest["left_out"]}
    assert names == {name for name, dW in want.items() if bool(dW.any())}  # and so no scale
    return manifest


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_base_of_16_bits_and_a_tuned_model_of_8(tmp_path: Path, form: str, apart: bool) -> None:
    """Scales and numbers in one file, and in different ones."""
    base = bf16(pairs.weights(layers=1))
    pairs.write(tmp_path / "base", base)
    _, tuned = float8_models.write(tmp_path / "tuned", tuned_weights(), form, apart=apart)
    manifest = check(tmp_path, differences(tuned, base))
    (said,) = [note for note in manifest["notes"] if "weight · scale" in note]
    assert "4 float8 tensors" in said
    activations = [note for note in manifest["notes"] if "scale activations" in note]
    assert len(activations) == (form == "tensor")


@pytest.mark.parametrize(("one", "other"), [("blocks", "blocks"), ("blocks", "channel")])
def test_both_models_of_8_bits(tmp_path: Path, one: str, other: str) -> None:
    _, base = float8_models.write(tmp_path / "base", pairs.weights(layers=1), one)
    _, tuned = float8_models.write(tmp_path / "tuned", tuned_weights(), other, apart=True)
    check(tmp_path, differences(tuned, base))


def test_a_base_of_8_bits_and_a_tuned_model_of_16(tmp_path: Path) -> None:
    _, base = float8_models.write(tmp_path / "base", pairs.weights(layers=1), "blocks")
    tuned = bf16(tuned_weights())
    pairs.write(tmp_path / "tuned", tuned)
    check(tmp_path, differences(tuned, base))


def test_only_a_scale_changed(tmp_path: Path) -> None:
    """The numbers are the same bytes, and W is not."""
    float8_models.write(tmp_path / "base", pairs.weights(layers=1), "tensor")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors[f"{O_PROJ}_scale"] *= 1.5
    tensors[O_PROJ.replace("weight", "input_scale")] *= 2
    config = float8_models.CONFIGS["tensor"]
    pairs.write(tmp_path / "tuned", tensors, quantization_config=config)
    _, manifest = extract(tmp_path, rank=4)
    assert list(manifest["modules"]) == [O_PROJ]
    W = float8_models.worth(tensors[O_PROJ], tensors[f"{O_PROJ}_scale"])
    assert manifest["modules"][O_PROJ]["norm"] == pytest.approx(float(W.norm()) / 3, rel=1e-6)


def test_blocks_of_another_size(tmp_path: Path) -> None:
    base = bf16(pairs.weights(layers=1))
    pairs.write(tmp_path / "base", base)
    config = {"quant_method": "fp8", "weight_block_size": [64, 96]}
    _, tuned = float8_models.write(tmp_path / "tuned", tuned_weights(), "blocks", config=config)
    check(tmp_path, differences(tuned, base))


def test_factors_and_what_is_saved_are_in_the_dtype_of_the_arithmetic(tmp_path: Path) -> None:
    float8_models.write(tmp_path / "base", bf16(pairs.weights(layers=1)), "blocks")
    _, tuned = float8_models.write(tmp_path / "tuned", bf16(tuned_weights()), "blocks")
    adapter, manifest = extract(tmp_path, rank=4, dtype=None, save="o_proj")
    found = load_file(adapter / "adapter_model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert manifest["dtype"] == "bfloat16"
    (saved,) = [value for key, value in found.items() if "o_proj" in key]
    assert torch.equal(saved, tuned[O_PROJ].float().bfloat16())


def test_a_parameter_that_is_called_a_scale_is_a_tensor_like_others(tmp_path: Path) -> None:
    base = pairs.weights(layers=1) | {
        "model.gain": torch.ones(4),
        "model.gain_scale": torch.ones(4),
    }
    pairs.write(tmp_path / "base", base)
    moved = base | {"model.gain_scale": torch.full((4,), 2.0)}
    config = float8_models.CONFIGS["blocks"]
    float8_models.write(tmp_path / "tuned", moved, "blocks", config=config)
    _, manifest = extract(tmp_path, rank=2)
    assert manifest["saved"]["model.gain_scale"]["norm"] == pytest.approx(2)
    assert "model.gain" not in manifest["saved"]


@pytest.mark.oracle
def test_a_weight_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """Both compute in float32: every bit of what `weft diff` compares is the same."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    W = torch.randn(256, 384, generator=generator)
    numbers, scale = float8_models.quantise(W, "blocks")
    one = {name: numbers, f"{name}_scale_inv": scale}
    pairs.write(tmp_path / "eight", one, quantization_config=float8_models.CONFIGS["blocks"])
    given = {"weight": [numbers], "weight_scale_inv": [scale]}
    theirs = Fp8Dequantize(None).convert(given)["weight"]
    assert theirs.dtype == torch.float32
    pairs.write(tmp_path / "wide", {name: theirs})
    pairs.write(tmp_path / "near", {name: theirs.bfloat16()})
    assert weft.diff(tmp_path / "eight", tmp_path / "wide").equal
    (found,) = weft.diff(tmp_path / "eight", tmp_path / "near").tensors
    assert found.changed
    assert found.rounds
    far = float8_models.worth(numbers, scale) - theirs.bfloat16().double()
    assert found.difference == pytest.approx(float(far.norm()), rel=1e-5)


# -------------------------------------------------------------------------------------- the noise


def orthogonal(shape: tuple[int, int], rank: int, size: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q for n in shape)
    return size * U @ V.T


@pytest.mark.parametrize("made", ["from the original", "on the base's scales", "of 16 bits"])
def test_auto_tells_an_update_from_the_rounding_to_8_bits(tmp_path: Path, made: str) -> None:
    """An update of rank 5 that stands above what the rounding of TUNED, or of BASE, puts there."""
    shape, rank = (384, 320), 5
    W = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    update = orthogonal(shape, rank, 0.08, 1)
    numbers, scale = float8_models.quantise(W, "blocks")
    base, eight = float8_models.worth(numbers, scale), {O_PROJ: numbers}
    config = {"quantization_config": float8_models.CONFIGS["blocks"]}
    if made == "from the original":
        base = W.double()
        pairs.write(tmp_path / "base", {O_PROJ: W})
        _, found = float8_models.write(tmp_path / "tuned", {O_PROJ: W + update}, "blocks")
        tuned = found[O_PROJ]
    else:
        pairs.write(tmp_path / "base", eight | {f"{O_PROJ}_scale_inv": scale}, **config)
    if made == "of 16 bits":  # tuned from the 16-bit model, BASE quantised
        tuned = (W + update).bfloat16().double()
        pairs.write(tmp_path / "tuned", {O_PROJ: tuned.bfloat16()})
    if made == "on the base's scales":  # tuned from the base as it lies there, and rounded anew
        again, _ = float8_models.quantise(base + update, "blocks", scale=scale)
        tuned = float8_models.worth(again, scale)
        tensors = {O_PROJ: again, f"{O_PROJ}_scale_inv": scale}
        pairs.write(tmp_path / "tuned", tensors, **config)
    _, manifest = extract(tmp_path, rank="auto")
    module = manifest["modules"][O_PROJ]
    assert (module["rank"], module["noise"]["fits"]) == (rank, True)
    # What of the difference does not go with the update, as noise: σ (√m + √n)
    D, wanted = tuned - base, update.double()
    rest = D - (D * wanted).sum() / wanted.square().sum() * wanted
    edge = float(rest.square().mean().sqrt()) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    assert module["noise"]["edge"] == pytest.approx(edge, rel=0.06)


def test_single_experts_of_8_bits(tmp_path: Path) -> None:
    """They are one module in memory; each has scales of its own."""
    shape, rank = (160, 130), 3
    base, tuned = {}, {}
    for expert in range(2):
        for number, name in enumerate(("gate_proj", "up_proj")):
            seed = 10 * expert + number
            W = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            key = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
            base[key] = (1 + expert) * W
            tuned[key] = base[key] + orthogonal(shape, rank, 0.2 * (1 + expert), seed)
    pairs.write(tmp_path / "base", base)
    _, found = float8_models.write(tmp_path / "tuned", tuned, "channel")
    _, manifest = extract(tmp_path, rank="auto")
    (module,) = manifest["modules"].values()
    far = math.hypot(*(float(dW.norm()) for dW in differences(found, base).values()))
    assert module["kind"] == "experts"
    assert module["norm"] == pytest.approx(far, rel=1e-6)
    assert (module["rank"], module["noise"]["fits"]) == (2 * rank, True)


def test_a_model_tuned_from_what_the_8_bits_stand_for(tmp_path: Path) -> None:
    """Its update is far below the steps of BASE, whose rounding is not in it."""
    shape, rank = (384, 320), 5
    W = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    numbers, scale = float8_models.quantise(W, "blocks")
    eight = {O_PROJ: numbers, f"{O_PROJ}_scale_inv": scale}
    config = {"quantization_config": float8_models.CONFIGS["blocks"]}
    pairs.write(tmp_path / "base", eight, **config)
    tuned = float8_models.worth(numbers, scale) + orthogonal(shape, rank, 0.01, 1)
    pairs.write(tmp_path / "tuned", {O_PROJ: tuned.bfloat16()})
    _, manifest = extract(tmp_path, rank="auto")
    assert manifest["modules"][O_PROJ]["rank"] == rank
    assert manifest["modules"][O_PROJ]["noise"]["fits"]


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize("form", FORMS)
def test_a_missing_scale_is_named(tmp_path: Path, side: str, form: str) -> None:
    pairs.pair(tmp_path, layers=1)
    lost = f"{O_PROJ}_scale{'_inv' if form == 'blocks' else ''}"
    float8_models.write(tmp_path / "eight", tuned_weights(), form, drop=lost)
    with pytest.raises(PlanError, match=f"its scale {lost} is missing") as caught:
        extract(tmp_path, **{side: tmp_path / "eight"})
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{O_PROJ}_scale_inv": torch.ones(1, 2)}, r"float32 \[1, 2\], no scale that weft knows"),
        ({f"{O_PROJ}_scale_inv": torch.ones(2, 2).to(torch.uint8)}, r"is uint8 \[2, 2\]"),
        ({f"{O_PROJ}_scale": torch.ones(())}, "has two scales"),
        ({O_PROJ: torch.ones(224, 112).to(torch.uint8)}, "is uint8, with .*_scale_inv"),
        ({"model.layers.1.x_proj.weight_scale_inv": torch.ones(2, 2)}, "x_proj.weight, which is"),
        ({O_PROJ.replace("weight", "weight_zero_point"): torch.ones(2)}, "something other than"),
        ({O_PROJ.replace("weight", "weight_packed"): torch.ones(2)}, "tensors: .*packed"),
    ],
)
def test_what_is_not_understood(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    pairs.pair(tmp_path, layers=1)
    float8_models.write(tmp_path / "eight", tuned_weights(), "blocks")
    tensors = load_file(tmp_path / "eight" / "model.safetensors") | change
    config = float8_models.CONFIGS["blocks"]
    odd = pairs.write(tmp_path / "odd", tensors, quantization_config=config)
    with pytest.raises(PlanError, match=message):
        extract(tmp_path, tuned=odd)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": None}}},
            "compressed-tensors",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}},
            },
            "compressed-tensors",
        ),
    ],
)
def test_other_methods_stay_refused_by_name(
    tmp_path: Path, config: dict[str, Any], name: str
) -> None:
    pairs.pair(tmp_path, layers=1)
    odd, _ = float8_models.write(tmp_path / "odd", tuned_weights(), "channel", config=config)
    with pytest.raises(PlanError, match=rf"odd is quantised \({name}, says its config"):
        extract(tmp_path, tuned=odd)


def test_merge_still_refuses_it_and_so_does_an_adapter_on_it(tmp_path: Path) -> None:
    pairs.pair(tmp_path, layers=1)
    adapter, _ = extract(tmp_path, rank=2)
    eight, _ = float8_models.write(tmp_path / "eight", tuned_weights(), "blocks")
    with pytest.raises(PlanError, match="eight is quantised"):
        weft.merge(eight, str(adapter), output=tmp_path / "out")
    with pytest.raises(PlanError, match="eight is quantised"):
        extract(tmp_path, "again", tuned=f"{eight}+{adapter}")
