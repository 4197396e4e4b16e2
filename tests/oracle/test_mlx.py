"""mlx-lm's LoRA, DoRA and full training, by the formulas of its `fuse`.

(The same cases, made and fused by mlx-lm 0.32.2 itself, gave the same weights to 2e-7 in float32,
and the merged models the same logits; MLX is too large a guest for this suite.)
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import DTYPES, Exact, load, write_adapter
from safetensors.torch import save_file

from tests.oracle.foreign import added, base_of, check, normal, normed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.oracle.conftest import Lab

RANK, SCALE = 4, 2.5
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write(folder: Path, tensors: dict[str, Tensor], kind: str, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    parameters = None if kind == "full" else {"rank": RANK, "dropout": 0.0, "scale": SCALE}
    known = {"model": "org/tiny", "fine_tune_type": kind, "num_layers": 2}
    content = known | {"lora_parameters": parameters} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def linear(name: str, W: Tensor, seed: int) -> tuple[dict[str, Tensor], Exact]:
    """A Linear's factors, and W + scale · (lora_a @ lora_b)ᵀ."""
    outputs, inputs = W.shape
    a, b = normal(inputs, RANK, seed=seed), normal(RANK, outputs, seed=seed + 1)
    return {f"{name}.lora_a": a, f"{name}.lora_b": b}, added(W, b.T, a.T, SCALE)


def table(name: str, W: Tensor, seed: int) -> tuple[dict[str, Tensor], Exact]:
    """An Embedding's factors, and W + scale · lora_a @ lora_b."""
    tokens, dims = W.shape
    a, b = normal(tokens, RANK, seed=seed), normal(RANK, dims, seed=seed + 1)
    return {f"{name}.lora_a": a, f"{name}.lora_b": b}, added(W, a, b, SCALE)


def adapt(base: Path, *, dora: bool, embedding: bool) -> tuple[dict[str, Tensor], dict[str, Exact]]:
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, Exact] = {}
    for seed, (name, W) in enumerate(load(base).items()):
        module = name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        if leaf not in (*LAYERS, *(["embed_tokens"] * embedding)):
            continue
        factors, value = (table if leaf == "embed_tokens" else linear)(module, W, 10 * seed)
        if dora:
            m = W.float().norm(dim=1) * (1 + normal(W.shape[0], seed=seed))
            factors[f"{module}.m"], value = m, normed(value, m)
        tensors |= factors
        wanted[name] = value
    return tensors, wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("embedding", [False, True], ids=["layers", "and-embedding"])
def test_low_rank(lab: Lab, tmp_path: Path, dtype: str, kind: str, embedding: bool) -> None:
    base = base_of(lab, "llama", dtype)
    tensors, wanted = adapt(base, dora=kind == "dora", embedding=embedding)
    check(base, write(tmp_path / "adapter", tensors, kind), tmp_path / "out", wanted)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_tied_embedding_stays_one(lab: Lab, tmp_path: Path, kind: str) -> None:
    """In MLX a tied head is the adapted embedding: both ends change."""
    base = base_of(lab, "llama-tied", "float32")
    tensors, wanted = adapt(base, dora=kind == "dora", embedding=True)
    check(base, write(tmp_path / "adapter", tensors, kind), tmp_path / "out", wanted)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_conv1d(lab: Lab, tmp_path: Path) -> None:
    """GPT-2's matrices are (in, out) on disk, and MLX turns them: a square one, too."""
    base = base_of(lab, "gpt2", "float32")
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, Exact] = {}
    for seed, (name, W) in enumerate(load(base).items()):
        if W.dim() == 2 and ".h." in name:
            factors, value = linear(name.removesuffix(".weight"), W.T, 10 * seed)
            tensors |= factors
            wanted[name] = Exact(value.value.T, value.slack.T)
    assert any(W.value.shape[0] == W.value.shape[1] for W in wanted.values())
    check(base, write(tmp_path / "adapter", tensors, "lora"), tmp_path / "out", wanted)


def test_same_bits_as_in_peft_form(lab: Lab, tmp_path: Path) -> None:
    base = base_of(lab, "llama", "float32")
    tensors, wanted = adapt(base, dora=False, embedding=False)
    check(base, write(tmp_path / "adapter", tensors, "lora"), tmp_path / "out", wanted)
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    turned = {
        f"{key.rpartition('.')[0]}.{names[key.rpartition('.')[2]]}": value.T
        for key, value in tensors.items()
    }
    config = {"r": RANK, "lora_alpha": SCALE * RANK, "target_modules": list(LAYERS)}
    check(base, write_adapter(tmp_path / "peft", turned, config), tmp_path / "peft-out", wanted)
    assert all(
        torch.equal(value, load(tmp_path / "peft-out")[name])
        for name, value in load(tmp_path / "out").items()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_full(lab: Lab, tmp_path: Path, dtype: str) -> None:
    base = base_of(lab, "llama", dtype)
    layer = {name: W for name, W in load(base).items() if ".layers.1." in name}
    trained = {name: W + normal(*W.shape).to(W.dtype) for name, W in layer.items()}
    wanted = {name: Exact(W.double(), 0 * W.double()) for name, W in trained.items()}
    check(base, write(tmp_path / "adapter", trained, "full"), tmp_path / "out", wanted)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"num_layers": 2}, 2.5),  # 0.19 and later: alpha stands there, and does nothing
        ({"lora_layers": 2}, 5.0),  # before 0.13: scale · alpha / rank
        ({"lora_layers": 2, "use_dora": False, "alpha": 4}, 2.5),  # alpha = rank: either way
    ],
)
def test_alpha_of_older_releases(
    lab: Lab, tmp_path: Path, config: dict[str, Any], scaling: float
) -> None:
    base = base_of(lab, "llama", "float32")
    W = load(base)[name := "model.layers.0.mlp.up_proj.weight"]
    factors, _ = linear(name.removesuffix(".weight"), W, 1)
    a, b = factors.values()
    adapter = tmp_path / "adapter"
    write(adapter, factors, "lora")
    numbers = {"rank": RANK, "alpha": config.pop("alpha", 8), "dropout": 0.0, "scale": SCALE}
    content = {"model": "org/tiny", "lora_parameters": numbers, **config}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    check(base, adapter, tmp_path / "out", {name: added(W, b.T, a.T, scaling)})
