"""Random Llama-shaped checkpoints and adapters for the benchmarks: real layouts, random values.

    python benchmarks/models.py 1b .bench/1b

writes base/, all/ (an adapter of every linear layer) and qv/ (of q_proj and v_proj only) there.
Written tensor by tensor, so that a large one needs little memory.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from weft.formats.safetensors import build_header, read_header


@dataclass(frozen=True)
class Size:
    """The shape of a model, and the number of files it is written in."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    shards: int
    tied: bool


SIZES = {
    "tiny": Size(4096, 256, 704, 4, 4, 2, 2, True),
    # Llama 3.2 1B: 1.24 B parameters, tied embeddings
    "1b": Size(128256, 2048, 8192, 16, 32, 8, 3, True),
    # Llama 3.1 8B's shapes, with as many of its layers as make 5 GB
    "8b": Size(128256, 4096, 14336, 7, 32, 8, 4, False),
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order of transformers."""
    h, i = size.hidden, size.intermediate
    kv = h // size.heads * size.key_value_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, h)}
    for n in range(size.layers):
        layer = f"model.layers.{n}"
        found[f"{layer}.self_attn.q_proj.weight"] = (h, h)
        found[f"{layer}.self_attn.k_proj.weight"] = (kv, h)
        found[f"{layer}.self_attn.v_proj.weight"] = (kv, h)
        found[f"{layer}.self_attn.o_proj.weight"] = (h, h)
        found[f"{layer}.mlp.gate_proj.weight"] = (i, h)
        found[f"{layer}.mlp.up_proj.weight"] = (i, h)
        found[f"{layer}.mlp.down_proj.weight"] = (h, i)
        found[f"{layer}.input_layernorm.weight"] = (h,)
        found[f"{layer}.post_attention_layernorm.weight"] = (h,)
    found["model.norm.weight"] = (h,)
    if not size.tied:
        found["lm_head.weight"] = (size.vocabulary, h)
    return found


def make_checkpoint(folder: Path, name: str) -> None:
    """Write the checkpoint `name` into `folder`, in bfloat16, with index and config."""
    size = SIZES[name]
    folder.mkdir(parents=True)
    found = shapes(size)
    total = sum(torch.Size(shape).numel() for shape in found.values())
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for tensor, shape in found.items():
        if filled >= total / size.shards and len(shards) < size.shards:
            shards.append({})
            filled = 0
        shards[-1][tensor] = shape
        filled += torch.Size(shape).numel()
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        head, _ = build_header([(n, "bfloat16", s) for n, s in shard.items()], {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(head)
            for tensor, shape in shard.items():
                weight_map[tensor] = file
                values = torch.randn(shape, dtype=torch.bfloat16) * 0.02
                if len(shape) == 1:
                    values = torch.ones(shape, dtype=torch.bfloat16)
                out.write(values.view(torch.uint8).numpy().data)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.hidden // size.heads,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": size.tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def make_adapter(folder: Path, name: str, rank: int, targets: tuple[str, ...]) -> None:
    """Write a PEFT adapter for the checkpoint `name`, float32, with a visible update."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for tensor, shape in shapes(SIZES[name]).items():
        module = tensor.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, shape[1]) / shape[1] ** 0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(shape[0], rank) * 0.01
    head, _ = build_header(
        [(n, "float32", tuple(t.shape)) for n, t in tensors.items()], {"format": "pt"}
    )
    with (folder / "adapter_model.safetensors").open("wb") as out:
        out.write(head)
        for values in tensors.values():
            out.write(values.numpy().data)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"random/{name}",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def make_tuned(base: Path, folder: Path, seed: int) -> None:
    """Write a full fine-tune of `base`: every matrix moved by a twentieth of its spread."""
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(base.iterdir()):
        shutil.copyfile(path, partial / path.name)
        if path.suffix != ".safetensors":
            continue
        with (partial / path.name).open("r+b") as file:
            for ref in read_header(path).tensors:
                if len(ref.shape) < 2:
                    continue
                file.seek(ref.start)
                raw = torch.frombuffer(bytearray(file.read(ref.nbytes)), dtype=torch.bfloat16)
                raw += torch.randn(raw.shape, dtype=torch.bfloat16, generator=generator) * 1e-3
                file.seek(ref.start)
                file.write(raw.view(torch.uint8).numpy().data)
    partial.rename(folder)


def make_all(folder: Path, name: str) -> None:
    """Write the checkpoint and both adapters; `folder` appears when they are complete."""
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    make_checkpoint(partial / "base", name)
    make_adapter(partial / "all", name, RANK, LINEAR)
    make_adapter(partial / "qv", name, RANK, ("q_proj", "v_proj"))
    partial.rename(folder)


if __name__ == "__main__":
    make_all(Path(sys.argv[2]), sys.argv[1])
