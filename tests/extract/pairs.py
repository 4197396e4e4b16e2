"""Bases and tuned models of some matrices, and what float64 says of them."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

import weft

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

# Higher than wide, wider than high, square, and so small that it is factorised in full.
SHAPES = {"q_proj": (288, 192), "down_proj": (192, 400), "o_proj": (224, 224), "k_proj": (96, 192)}
VOCABULARY = 120


def names(layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Of a model that looks like Llama's."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, 64)}
    for layer in range(layers):
        for name, shape in SHAPES.items():
            found[f"model.layers.{layer}.self_attn.{name}.weight"] = shape
        found[f"model.layers.{layer}.self_attn.k_proj.bias"] = (96,)
        found[f"model.layers.{layer}.input_layernorm.weight"] = (64,)
    return found | {"model.norm.weight": (64,), "lm_head.weight": (VOCABULARY, 64)}


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    given = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(given | config))
    return folder


def weights(dtype: torch.dtype = torch.float32, layers: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.02 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in names(layers).items()
    }


def pair(
    root: Path,
    dtype: torch.dtype = torch.float32,
    *,
    moved: Callable[[str], bool] = lambda name: True,
    delta: Callable[[tuple[int, ...], torch.Generator], Tensor] | None = None,
    layers: int = 2,
) -> tuple[Path, Path]:
    """TUNED and BASE: `delta` is added to what is `moved`, noise of a falling spectrum without."""
    base = weights(dtype, layers)
    tuned = dict(base)
    for number, (name, W) in enumerate(base.items()):
        if moved(name):
            generator = torch.Generator().manual_seed(100 + number)
            change = (delta or falling)(tuple(W.shape), generator)
            tuned[name] = (W.float() + change).to(dtype)
    return write(root / "tuned", tuned), write(root / "base", base)


@functools.cache
def _fallen(shape: tuple[int, ...], seed: int) -> Tensor:
    return _falling(shape, torch.Generator().manual_seed(seed))


def falling(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Singular values that fall slowly, as those of training do."""
    return _fallen(shape, generator.initial_seed())


def _falling(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = 1e-3 * torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return noise
    U, S, V = torch.linalg.svd(noise, full_matrices=False)
    return U @ torch.diag(S * torch.arange(1, len(S) + 1) ** -0.5) @ V


def low_rank(rank: int, size: float) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """B @ A of random factors, each element of about `size`; vectors stay."""

    def made(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if len(shape) < 2:
            return torch.zeros(shape)
        B = torch.randn(shape[0], rank, generator=generator)
        return size * (B @ torch.randn(rank, shape[1], generator=generator)) / rank**0.5

    return made


def delta_of(adapter: Path) -> dict[str, Tensor]:
    """Tensor name -> what the adapter's files say its ΔW is, in float64, of matrices and tables."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {}
    for key, A in tensors.items():
        module = key.removeprefix("base_model.model.").partition(".lora_")[0]
        scaling = 1.0 if config["alpha_pattern"] or not _alpha(config) else None
        if key.endswith(".lora_A.weight"):
            B = tensors[key.replace("lora_A", "lora_B")]
            product = B.double() @ A.double()
        elif key.endswith(".lora_embedding_A"):
            B = tensors[key.replace("embedding_A", "embedding_B")]
            product = (B.double() @ A.double()).T
        else:
            continue
        scaling = scaling or config["lora_alpha"] / A.shape[0]
        found[f"{module}.weight"] = scaling * product
    return found


def _alpha(config: Mapping[str, Any]) -> bool:
    """One alpha for all, and not each module's rank."""
    return not config["alpha_pattern"] and config["lora_alpha"] != config["r"]


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """‖one − other‖, over all tensors, in float64."""
    assert one.keys() == other.keys()
    total = sum(float((one[n].double() - other[n].double()).square().sum()) for n in one)
    return float(total**0.5)


def extract(root: Path, name: str = "adapter", **kwargs: Any) -> tuple[Path, dict[str, Any]]:
    """From `root`/tuned and `root`/base; -> the folder and its manifest."""
    report = weft.extract(
        kwargs.pop("tuned", root / "tuned"),
        base=kwargs.pop("base", root / "base"),
        output=root / name,
        **{"threads": 2, "dtype": "float32"} | kwargs,
    )
    assert json.loads((root / name / "weft.json").read_text()) == json.loads(
        json.dumps(report.manifest)
    )
    assert not (root / f"{name}.partial").exists()
    return root / name, report.manifest


def differences(root: Path) -> dict[str, Tensor]:
    tuned, base = (load_file(root / name / "model.safetensors") for name in ("tuned", "base"))
    return {name: tuned[name].double() - base[name].double() for name in tuned}


def merged(root: Path, adapter: Path, dtype: str = "float32") -> dict[str, Tensor]:
    out = root / f"{adapter.name}-merged"
    weft.merge(root / "base", str(adapter), output=out, dtype=dtype, threads=1)
    return load_file(out / "model.safetensors")
