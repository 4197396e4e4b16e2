"""Tiny models for the comparison with MergeKit: names and shapes of real architectures.

Written without transformers and without torch's random numbers, so that the two sides of the
comparison, in different environments, read the same bytes. numpy's Philox counts, and its raw
numbers are the same in every release.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, INTERMEDIATE, HEADS, KV, VOCABULARY, LAYERS, EXPERTS = 32, 48, 4, 2, 96, 3, 4
HEAD = HIDDEN // HEADS
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _attention(layer: str, *, bias: bool = False) -> dict[str, tuple[int, ...]]:
    sizes = {"q": HIDDEN, "k": KV * HEAD, "v": KV * HEAD}
    found: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        found[f"{layer}.self_attn.{name}_proj.weight"] = (size, HIDDEN)
        if bias:
            found[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
    return {**found, f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN)}


def _mlp(layer: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{layer}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{layer}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }


def _experts(layer: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{layer}.block_sparse_moe.gate.weight": (EXPERTS, HIDDEN)}
    for n in range(EXPERTS):
        expert = f"{layer}.block_sparse_moe.experts.{n}"
        found[f"{expert}.w1.weight"] = (INTERMEDIATE, HIDDEN)
        found[f"{expert}.w2.weight"] = (HIDDEN, INTERMEDIATE)
        found[f"{expert}.w3.weight"] = (INTERMEDIATE, HIDDEN)
    return found


def _decoder(
    kind: str, vocabulary: int, layers: int, *, tied: bool, root: str = "model"
) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{root}.embed_tokens.weight": (vocabulary, HIDDEN)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind in ("gemma2", "gemma3"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for n in range(layers):
        layer = f"{root}.layers.{n}"
        found |= _attention(layer, bias=kind == "qwen2")
        if kind == "gemma3":
            found |= {f"{layer}.self_attn.{x}_norm.weight": (HEAD,) for x in "qk"}
        found |= _experts(layer) if kind == "mixtral" else _mlp(layer)
        found |= {f"{layer}.{norm}.weight": (HIDDEN,) for norm in norms}
    found[f"{root}.norm.weight"] = (HIDDEN,)
    if not tied:
        found[f"{root.removesuffix('model')}lm_head.weight"] = (vocabulary, HIDDEN)
    return found


def _vision() -> dict[str, tuple[int, ...]]:
    root = "vision_tower.vision_model"
    found: dict[str, tuple[int, ...]] = {
        f"{root}.embeddings.patch_embedding.weight": (HIDDEN, 3, 4, 4),
        f"{root}.embeddings.patch_embedding.bias": (HIDDEN,),
        f"{root}.embeddings.position_embedding.weight": (16, HIDDEN),
        f"{root}.post_layernorm.weight": (HIDDEN,),
        f"{root}.post_layernorm.bias": (HIDDEN,),
        "multi_modal_projector.mm_input_projection_weight": (HIDDEN, HIDDEN),
        "multi_modal_projector.mm_soft_emb_norm.weight": (HIDDEN,),
    }
    linear = {
        f"self_attn.{x}": (HIDDEN, HIDDEN) for x in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    linear |= {"mlp.fc1": (INTERMEDIATE, HIDDEN), "mlp.fc2": (HIDDEN, INTERMEDIATE)}
    for n in range(2):
        layer = f"{root}.encoder.layers.{n}"
        for name, shape in linear.items():
            found |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            found |= {f"{layer}.{norm}.weight": (HIDDEN,), f"{layer}.{norm}.bias": (HIDDEN,)}
    return found


def shapes(kind: str, *, vocabulary: int, layers: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model."""
    if kind == "gemma3vl":
        text = _decoder("gemma3", vocabulary, layers, tied=True, root="language_model.model")
        return text | _vision()
    return _decoder(kind, vocabulary, layers, tied=tied)


def config(kind: str, *, vocabulary: int, layers: int, tied: bool) -> dict[str, Any]:
    """Its config.json."""
    own = COMMON | {"vocab_size": vocabulary, "num_hidden_layers": layers}
    own |= {"tie_word_embeddings": tied}
    gemma = {"head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 64}
    match kind:
        case "llama":
            return own | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        case "qwen2":
            return own | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        case "gemma2":
            return own | gemma | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
        case "mixtral":
            moe = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
            return own | moe | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        case _:
            vision = {
                "hidden_size": HIDDEN,
                "intermediate_size": INTERMEDIATE,
                "num_hidden_layers": 2,
                "num_attention_heads": HEADS,
                "image_size": 16,
                "patch_size": 4,
                "model_type": "siglip_vision_model",
            }
            return {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "model_type": "gemma3",
                "text_config": own | gemma | {"model_type": "gemma3_text"},
                "vision_config": vision,
                "mm_tokens_per_image": 4,
                "torch_dtype": "float32",
            }


def numbers(key: str, shape: tuple[int, ...], spread: float) -> np.ndarray[Any, Any]:
    """Uniform float32 values of a standard deviation, the same everywhere."""
    count = int(np.prod(shape))
    raw = np.random.Philox(key=zlib.crc32(key.encode())).random_raw(count)
    uniform = (raw >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5
    return (uniform * 12**0.5 * spread).astype(np.float32).reshape(shape)


def write_model(
    folder: Path,
    kind: str,
    seed: int | None,
    *,
    vocabulary: int = VOCABULARY,
    layers: int = LAYERS,
    tied: bool = False,
    shards: int = 1,
    spread: float = 0.01,
) -> None:
    """The base (seed None), or a fine-tune of it."""
    folder.mkdir(parents=True)
    found = shapes(kind, vocabulary=vocabulary, layers=layers, tied=tied)
    tensors = {}
    for name, shape in found.items():
        values = numbers(f"base {name}", shape, 0.02)
        if seed is not None:
            values = values + numbers(f"{seed} {name}", shape, spread)
        tensors[name] = values
    names = list(tensors)
    parts = [names[n::shards] for n in range(shards)]
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    if shards > 1:
        weight_map = {n: file for file, part in zip(files, parts, strict=True) for n in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    made = config(kind, vocabulary=vocabulary, layers=layers, tied=tied)
    (folder / "config.json").write_text(json.dumps(made, indent=1))


def write_half(folder: Path) -> None:
    """The base of the llamas in bfloat16."""
    folder.mkdir(parents=True)
    tensors = {
        name: torch.from_numpy(numbers(f"base {name}", shape, 0.02)).bfloat16()
        for name, shape in shapes("llama", vocabulary=VOCABULARY, layers=LAYERS, tied=False).items()
    }
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    made = config("llama", vocabulary=VOCABULARY, layers=LAYERS, tied=False)
    (folder / "config.json").write_text(json.dumps(made | {"torch_dtype": "bfloat16"}))


def write_adapter(
    folder: Path, *, rms: float, root: str = "model"
) -> dict[str, np.ndarray[Any, Any]]:
    """LoRA of rank 4 on every q_proj of `root`; what it adds to the tensor of each, in float64.

    Args:
        folder: Where it goes.
        rms: About that of what it adds to a weight.
        root: Of the layers, as PEFT calls it in memory.
    """
    folder.mkdir(parents=True)
    factors, added = {}, {}
    for n in range(LAYERS):
        name = f"layers.{n}.self_attn.q_proj"
        A = numbers(f"A {name}", (4, HIDDEN), 1.0)
        B = numbers(f"B {name}", (HIDDEN, 4), rms / 3)
        factors[f"base_model.model.{root}.{name}.lora_A.weight"] = A
        factors[f"base_model.model.{root}.{name}.lora_B.weight"] = B
        added[f"model.{name}.weight"] = 1.5 * B.astype(np.float64) @ A.astype(np.float64)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6}
    told |= {"target_modules": ["q_proj"], "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return added


def write_all(root: Path) -> None:
    """Of every kind a base and three fine-tunes; and the odd ones."""
    for kind in ("llama", "qwen2", "gemma2", "mixtral", "gemma3vl"):
        tied = kind == "gemma2"
        write_model(root / f"{kind}-base", kind, None, tied=tied)
        for seed, name in enumerate("abc", 1):
            write_model(root / f"{kind}-{name}", kind, seed, tied=tied, shards=seed)
    write_model(root / "llama-tied-base", "llama", None, tied=True)
    write_model(root / "llama-tied-a", "llama", 1, tied=True)
    write_model(root / "llama-tied-b", "llama", 2, tied=True, shards=2)
    write_model(root / "llama-near-a", "llama", 4, spread=1e-5)
    write_model(root / "llama-deep", "llama", 5, layers=5)
    write_half(root / "llama-half-base")
    write_adapter(root / "llama-lora", rms=1e-4)


def fingerprint(values: np.ndarray[Any, Any]) -> list[float]:
    """The norm and four projections: enough to tell two tensors apart, and small to keep."""
    flat = values.astype(np.float64).reshape(-1)
    found = [float(np.linalg.norm(flat))]
    for number in range(4):
        raw = np.random.Philox(key=number + 1).random_raw(flat.size)
        found.append(float(np.where(raw >> np.uint64(63), flat, -flat).sum()))
    return found
