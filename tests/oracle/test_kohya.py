"""Files of Kohya's sd-scripts and of LyCORIS, by their formulas, on a language model.

(What LyCORIS 4.1.3 trained on this model merges to its forward pass, LoRA, DoRA, LoHa and LoKr, to
1e-5 of the logits. Its own merge of LoHa and LoKr applies alpha / r twice.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import DTYPES, Exact, gamma, load
from safetensors.torch import save_file

from tests.oracle.foreign import added, base_of, check, normal, normed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.oracle.conftest import Lab

RANK, ALPHA = 4, 6.0
Module = tuple[dict[str, "Tensor"], Exact]


def lora(W: Tensor, seed: int) -> Module:
    down, up = normal(RANK, W.shape[1], seed=seed), normal(W.shape[0], RANK, seed=seed + 1)
    return {"lora_down.weight": down, "lora_up.weight": up}, added(W, up, down, ALPHA / RANK)


def dora(W: Tensor, seed: int) -> Module:
    """`dora_scale` (out, 1): a norm per row."""
    parts, V = lora(W, seed)
    m = W.float().norm(dim=1) * (1 + normal(W.shape[0], seed=seed + 2))
    return parts | {"dora_scale": m[:, None]}, normed(V, m)


def dora_of_inputs(W: Tensor, seed: int) -> Module:
    """`dora_scale` (1, in), LyCORIS's wd_on_output=False: a norm per column."""
    parts, V = lora(W, seed)
    m = W.float().norm(dim=0) * (1 + normal(W.shape[1], seed=seed + 2))
    turned = normed(Exact(V.value.T, V.slack.T), m)
    return parts | {"dora_scale": m[None]}, Exact(turned.value.T, turned.slack.T)


def loha(W: Tensor, seed: int) -> Module:
    parts = {
        f"hada_w{n}_{x}": normal(*shape, seed=seed + 2 * n + (x == "b"), scale=0.4)
        for n in (1, 2)
        for x, shape in (("a", (W.shape[0], RANK)), ("b", (RANK, W.shape[1])))
    }
    one, two = (
        (a.double() @ b.double(), a.double().abs() @ b.double().abs())
        for a, b in ((parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in (1, 2))
    )
    scaling = ALPHA / RANK
    delta, size = scaling * one[0] * two[0], scaling * one[1] * two[1]
    return parts, Exact(W.double() + delta, gamma(2 * RANK + 6) * size + gamma(3) * delta.abs())


def write(file: Path, modules: dict[str, dict[str, Tensor]], prefix: str, alpha: Any) -> Path:
    tensors = {
        f"{prefix}{name.replace('.', '_')}.{ending}": value
        for name, parts in modules.items()
        for ending, value in parts.items()
    }
    if alpha is not None:
        for name in modules:
            tensors[f"{prefix}{name.replace('.', '_')}.alpha"] = alpha.clone()
    save_file(tensors, file, {"ss_network_module": "networks.lora"})
    return file


def adapt(base: Path, method: Any) -> tuple[dict[str, dict[str, Tensor]], dict[str, Exact]]:
    modules, wanted = {}, {}
    for seed, (name, W) in enumerate(load(base).items()):
        if W.dim() == 2 and "embed" not in name:
            modules[name.removesuffix(".weight")], wanted[name] = method(W, 10 * seed)
    assert len(wanted) == 15
    return modules, wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [lora, dora, dora_of_inputs, loha])
def test_methods(lab: Lab, tmp_path: Path, dtype: str, method: Any) -> None:
    base = base_of(lab, "llama", dtype)
    modules, wanted = adapt(base, method)
    alpha = torch.tensor(ALPHA)
    check(
        base,
        write(tmp_path / "a.safetensors", modules, "lycoris_", alpha),
        tmp_path / "out",
        wanted,
    )


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(ALPHA, dtype=torch.bfloat16),
        torch.tensor(ALPHA, dtype=torch.float16),
        torch.tensor([ALPHA], dtype=torch.float64),
        torch.tensor(int(ALPHA)),
    ],
    ids=["bfloat16", "float16", "float64-of-one", "int64"],
)
def test_alpha_in_any_dtype(lab: Lab, tmp_path: Path, alpha: Tensor) -> None:
    base = base_of(lab, "llama", "float32")
    modules, wanted = adapt(base, lora)
    check(
        base, write(tmp_path / "a.safetensors", modules, "lora_", alpha), tmp_path / "out", wanted
    )


def test_no_alpha_is_a_scaling_of_one(lab: Lab, tmp_path: Path) -> None:
    base = base_of(lab, "llama", "float32")
    modules, _ = adapt(base, lora)
    before = load(base)
    wanted = {
        f"{name}.weight": added(
            before[f"{name}.weight"], parts["lora_up.weight"], parts["lora_down.weight"], 1.0
        )
        for name, parts in modules.items()
    }
    check(base, write(tmp_path / "a.safetensors", modules, "lora_", None), tmp_path / "out", wanted)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "lora_unet_", "mine_", "my_own_"])
def test_prefixes(lab: Lab, tmp_path: Path, prefix: str) -> None:
    base = base_of(lab, "llama", "float32")
    modules, wanted = adapt(base, lora)
    alpha = torch.tensor(ALPHA)
    check(base, write(tmp_path / "a.safetensors", modules, prefix, alpha), tmp_path / "out", wanted)


def test_of_the_model_inside(lab: Lab, tmp_path: Path) -> None:
    """sd-scripts trains text encoders, whose names lack the `model.` of a model with a head."""
    base = base_of(lab, "llama", "float32")
    modules, wanted = adapt(base, lora)
    del wanted["lm_head.weight"], modules["lm_head"]
    inside = {name.removeprefix("model."): parts for name, parts in modules.items()}
    alpha = torch.tensor(ALPHA)
    check(
        base, write(tmp_path / "a.safetensors", inside, "lora_te_", alpha), tmp_path / "out", wanted
    )


def test_lokr(lab: Lab, tmp_path: Path) -> None:
    pytest.importorskip("weft.deltas.lokr")
    base = base_of(lab, "llama", "float32")

    def lokr(W: Tensor, seed: int) -> Module:
        w1 = normal(4, 4, seed=seed, scale=0.4)
        a, b = (
            normal(W.shape[0] // 4, RANK, seed=seed + 1),
            normal(RANK, W.shape[1] // 4, seed=seed),
        )
        delta = ALPHA / RANK * torch.kron(w1.double(), a.double() @ b.double())
        size = ALPHA / RANK * torch.kron(w1.double().abs(), a.double().abs() @ b.double().abs())
        parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
        return parts, Exact(W.double() + delta, gamma(RANK + 6) * size + gamma(3) * delta.abs())

    modules, wanted = adapt(base, lokr)
    alpha = torch.tensor(ALPHA)
    check(
        base, write(tmp_path / "a.safetensors", modules, "lora_", alpha), tmp_path / "out", wanted
    )


def test_lokr_of_full_factors_is_not_scaled(lab: Lab, tmp_path: Path) -> None:
    pytest.importorskip("weft.deltas.lokr")
    base = base_of(lab, "llama", "float32")

    def lokr(W: Tensor, seed: int) -> Module:
        w1 = normal(4, 4, seed=seed, scale=0.4)
        w2 = normal(W.shape[0] // 4, W.shape[1] // 4, seed=seed + 1)
        delta = torch.kron(w1.double(), w2.double())
        return {"lokr_w1": w1, "lokr_w2": w2}, Exact(W.double() + delta, gamma(4) * delta.abs())

    modules, wanted = adapt(base, lokr)
    alpha = torch.tensor(16.0)
    check(
        base, write(tmp_path / "a.safetensors", modules, "lora_", alpha), tmp_path / "out", wanted
    )
