"""Out of a model and back, and into it and back, for any shapes, ranks, dtypes and rules."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pairs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import weft

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

QUIET: Any = {"deadline": None, "suppress_health_check": list(HealthCheck)}
SIDES = st.integers(8, 90)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")


def write_adapter(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], alpha: float) -> Path:
    """As PEFT does; module -> (B, A)."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (B, A) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(factors.values()))[1].shape[0]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "b"}
    config["target_modules"] = ["q_proj", "up_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@settings(max_examples=15, **QUIET)
@given(m=SIDES, n=SIDES, rank=st.integers(1, 6), dtype=DTYPES, size=st.floats(-5, -1))
def test_a_merged_adapter_comes_back_to_the_noise_of_rounding(
    tmp_path_factory: Any, m: int, n: int, rank: int, dtype: torch.dtype, size: float
) -> None:
    """Of updates from a part of an ulp to half of W."""
    root = tmp_path_factory.mktemp("merged")
    generator = torch.Generator().manual_seed(m * 1000 + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = dict(zip(MODULES, ((m, n), (n, m)), strict=True))
    base = {f"{name}.weight": (0.02 * normal(*shape)).to(dtype) for name, shape in shapes.items()}
    base["model.norm.weight"] = torch.ones(n, dtype=dtype)
    pairs.write(root / "base", base)
    factors = {
        name: (normal(rows, rank), 10**size * normal(rank, columns) / rank**0.5)
        for name, (rows, columns) in shapes.items()
    }
    adapter = write_adapter(root / "adapter", factors, alpha=2 * rank)
    weft.merge(root / "base", adapter, output=root / "tuned", threads=1)
    if not weft.diff(root / "tuned", root / "base").equal:
        weft.extract(
            root / "tuned", base=root / "base", output=root / "back", rank=rank, dtype="float32"
        )
        found = pairs.delta_of(root / "back")
    else:
        found = {}
    tuned = load_file(root / "tuned" / "model.safetensors")
    for name, (B, A) in factors.items():
        true = 2 * B.double() @ A.double()
        seen = tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        noise = float((seen - true).norm())
        error = float((found.get(f"{name}.weight", torch.zeros_like(true)) - true).norm())
        # ‖D_r − Δ‖ ≤ ‖D_r − D‖ + ‖D − Δ‖, and no rank r is nearer to D than D_r, not Δ either.
        assert error <= 2.004 * noise + 2e-6 * float(true.norm())
        if dtype == torch.float32:
            assert error <= 1e-4 * float(true.norm()) or size < -4


RULES = st.sampled_from(
    [{"rank": 3}, {"rank": "auto"}, {"energy": 0.6}, {"size": "60kB"}, {"rank": 4, "alpha": 7.0}]
)


@settings(max_examples=15, **QUIET)
@given(
    rule=RULES,
    dtypes=st.tuples(DTYPES, DTYPES),
    factors=st.sampled_from(["float32", "bfloat16", "float16"]),
    embed=st.sampled_from([None, "lora", "save", "skip"]),
    exclude=st.sampled_from([None, "o_proj", "norm", "layers.0."]),
    seed=st.integers(0, 3),
)
def test_what_is_merged_back_is_off_by_what_the_manifest_says(
    tmp_path_factory: Any,
    rule: dict[str, Any],
    dtypes: tuple[torch.dtype, torch.dtype],
    factors: str,
    embed: str | None,
    exclude: str | None,
    seed: int,
) -> None:
    root = tmp_path_factory.mktemp("back")
    generator = torch.Generator().manual_seed(seed)
    base = {name: 0.02 * torch.randn(s, generator=generator) for name, s in SMALL.items()}
    tuned = {n: W + 2e-3 * torch.randn(W.shape, generator=generator) for n, W in base.items()}
    for folder, tensors, dtype in (("base", base, dtypes[0]), ("tuned", tuned, dtypes[1])):
        pairs.write(root / folder, {name: W.to(dtype) for name, W in tensors.items()})
    report = weft.extract(
        root / "tuned", base=root / "base", output=root / "adapter", dtype=factors, embed=embed,
        exclude=exclude, threads=1, **rule,
    )  # fmt: skip
    weft.merge(root / "base", root / "adapter", output=root / "merged", dtype="float32", threads=1)
    before, after, back = (
        load_file(root / name / "model.safetensors") for name in ("base", "tuned", "merged")
    )
    whole = pairs.distance(before, after)
    totals = report.manifest["totals"]
    assert totals["relative_error"] == pytest.approx(
        pairs.distance(back, after) / whole, rel=2e-3, abs=1e-5
    )
    norm = math.sqrt(sum(float(W.double().square().sum()) for W in after.values()))
    assert totals["model_error"] == pytest.approx(totals["relative_error"] * whole / norm, rel=1e-3)
    named = {*report.manifest["modules"], *report.manifest["saved"], *report.manifest["left_out"]}
    assert named == set(SMALL)


SMALL = {
    "model.embed_tokens.weight": (pairs.VOCABULARY, 40),
    "model.layers.0.self_attn.q_proj.weight": (60, 40),
    "model.layers.0.self_attn.q_proj.bias": (60,),
    "model.layers.0.self_attn.o_proj.weight": (40, 60),
    "model.layers.1.self_attn.o_proj.weight": (40, 150),
    "model.norm.weight": (40,),
    "lm_head.weight": (pairs.VOCABULARY, 40),
}
