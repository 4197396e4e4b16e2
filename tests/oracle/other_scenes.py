"""Scenes of old releases, of experts, of quantised bases and of vision-language models."""

from __future__ import annotations

import json
import shutil
import tarfile
from typing import TYPE_CHECKING, Any

import helpers
import peft
import torch
from corpus.models import MODELS
from safetensors.torch import load_file, save_file

from oracle import corpus_entries as known
from tests.oracle import (
    test_experts,
    test_loftq,
    test_lora_layers,
    test_lora_variants,
    test_moved_base,
)
from tests.oracle.scenes import AUTO, Scene, filled, llama, moved, on_tokens, toy
from tests.plan.test_repairs import rename as renamed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn


def convolutions(folder: Path, *, layers: list[str]) -> Scene:
    """LoRA on convolutions of one to three dimensions."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=layers)
    made = test_lora_layers.Convolutions
    return toy(config, folder, model=made, inputs=test_lora_layers.PICTURES)


def grouped(folder: Path) -> Scene:
    inputs = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(3))
    config = peft.LoraConfig(r=4, target_modules=["conv"])
    return toy(config, folder, model=test_lora_layers.Grouped, inputs=inputs)


# ------------------------------------------------------------------------------------ old releases


def of_release(folder: Path, *, kind: str, release: str) -> Scene:
    """What a release of PEFT wrote, from `tests/corpus`; `want` is what it trained."""
    (entry,) = (e for e in known.entries() if (e.kind, e.release) == (kind, release))
    for name in (release, "bases"):
        with tarfile.open(known.CORPUS / f"{name}.tar.xz") as tar:
            tar.extractall(folder / "corpus" / name, filter="data")
    corpus, model = folder / "corpus", MODELS[entry.model]
    shutil.copytree(entry.folder(corpus), folder / "adapter")
    shutil.copytree(corpus / "bases" / entry.model, folder / "base")
    want = entry.outputs(corpus).get("")
    lost = known.rule(known.LOST, entry)
    want = None if lost or want is None else want.float()

    def opened(path: Path) -> nn.Module:
        return model.load(path).float()  # type: ignore[no-any-return]

    return Scene(folder, opened, model.compute, want)


# ----------------------------------------------------------------------------------------- experts


def fused(folder: Path, *, model: str = "mixtral", form: str = "fused") -> Scene:
    base = test_experts.save_base(model, form, "float32", folder / "base")
    trained = test_experts.train(base, target_parameters=test_experts.BOTH)
    trained.save_pretrained(folder / "adapter")
    return Scene(folder, test_experts.open_base, helpers.logits, helpers.logits(trained))


def single(folder: Path, *, model: str = "mixtral", form: str = "fused", **config: Any) -> Scene:
    """LoRA on each expert by itself; what that gives is tested on a base that has them so."""
    hub = test_experts.save_base(model, "hub", "float32", folder / "hub")
    names = test_experts.EXPERTS[model]
    adapter = test_experts.write_expert_adapter(hub, folder / "adapter", names=names)
    test_experts.edit(adapter, **config)
    test_experts.weft_merge(hub, adapter, folder / "apart")
    want = helpers.logits(test_experts.open_base(folder / "apart"))
    test_experts.save_base(model, form, "float32", folder / "base")
    return Scene(folder, test_experts.open_base, helpers.logits, want)


def grouped_by_expert(folder: Path) -> Scene:
    """As Unsloth wrote it before September 2026: the columns of an expert together."""
    scene = fused(folder)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = {
        key: value.reshape(len(value), -1, 4).mT.reshape(len(value), -1).contiguous()
        if ".lora_B." in key
        else value
        for key, value in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    test_moved_base.edit(folder / "adapter", lora_B_layout="grouped_by_expert")
    return scene


# --------------------------------------------------------------------------------- vision-language


# What the names of a text part's modules were, and what they are.
BEFORE = {
    "LLaVA": ("model.language_model.", "language_model.model."),
    "Qwen2-VL": ("model.language_model.", "model."),
}


def vision(folder: Path, *, model: str, rename: tuple[str, str] | None = None) -> Scene:
    """An adapter of the text part; the names of its modules as they were before 4.52."""
    text = {
        "vocab_size": helpers.VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 48,
    }  # fmt: skip
    tf = helpers.transformers
    if model == "qwen2-vl":
        sections = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}
        config = tf.Qwen2VLConfig(
            text_config={**text, "rope_parameters": sections}, vision_config=vision
        )
        made = tf.Qwen2VLForConditionalGeneration(config)
    else:
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
        config = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**vision), text_config=tf.LlamaConfig(**text)
        )
        made = tf.LlavaForConditionalGeneration(config)
    helpers.randomise(made)
    made.save_pretrained(folder / "base")
    auto = "AutoModelForImageTextToText"
    trained = helpers.train(folder / "base", auto, {"target_modules": ["o_proj", "down_proj"]})
    trained.save_pretrained(folder / "adapter")
    if rename:
        renamed(folder / "adapter", lambda key: key.replace(*rename))

    def opened(path: Path) -> Any:
        return helpers.open_model(path, auto)

    return Scene(folder, opened, helpers.logits, helpers.logits(trained))


# --------------------------------------------------------------------------------- quantised bases

_UP = "model.layers.0.mlp.up_proj"


def _bytes(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.uint8)


# What stands in the place of a matrix (64, 96), and in config.json: (name -> tensor, config).
QUANTISED: dict[str, tuple[dict[str, Callable[[], Tensor]], dict[str, Any]]] = {
    "bitsandbytes, 4 bits": (
        {
            "weight": lambda: _bytes(64 * 96 // 2, 1),
            "weight.absmax": lambda: torch.ones(96),
            "weight.quant_map": lambda: torch.ones(16),
            "weight.quant_state.bitsandbytes__nf4": lambda: _bytes(82),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
    "bitsandbytes, 8 bits": (
        {"weight": lambda: torch.ones(96, 64).to(torch.int8), "SCB": lambda: torch.ones(96)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ),
    "GPTQ": (
        {
            "qweight": lambda: torch.ones(64 // 8, 96).int(),
            "qzeros": lambda: torch.ones(1, 96 // 8).int(),
            "scales": lambda: torch.ones(1, 96).half(),
            "g_idx": lambda: torch.zeros(64).int(),
        },
        {"quant_method": "gptq", "bits": 4, "group_size": 64},
    ),
    "AWQ": (
        {
            "qweight": lambda: torch.ones(64, 96 // 8).int(),
            "qzeros": lambda: torch.ones(1, 96 // 8).int(),
            "scales": lambda: torch.ones(1, 96).half(),
        },
        {"quant_method": "awq", "bits": 4, "group_size": 64},
    ),
    "FP8": (
        {
            "weight": lambda: torch.ones(96, 64).to(torch.float8_e4m3fn),
            "weight_scale_inv": lambda: torch.ones(1, 1),
        },
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "compressed-tensors": (
        {
            "weight_packed": lambda: torch.ones(96, 64 // 8).int(),
            "weight_scale": lambda: torch.ones(96, 1),
            "weight_shape": lambda: torch.tensor([96, 64]),
        },
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "MXFP4": (
        {
            "weight_blocks": lambda: _bytes(96, 2, 16),
            "weight_scales": lambda: _bytes(96, 2),
        },
        {"quant_method": "mxfp4"},
    ),
}


def quantised(folder: Path, *, kind: str, told: bool = True) -> Scene:
    """A base of which one matrix is as `kind` writes it; `told`: and its config says so."""
    scene = llama(folder)
    tensors, config = QUANTISED[kind]
    file = folder / "base" / "model.safetensors"
    values = load_file(file)
    del values[f"{_UP}.weight"]
    values |= {f"{_UP}.{name}": make() for name, make in tensors.items()}
    save_file(values, file, {"format": "pt"})
    if told:
        path = folder / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    scene.want, scene.compared, scene.says = None, False, kind
    return scene


def x_lora(folder: Path) -> Scene:
    """A classifier that mixes LoRAs."""
    scene = llama(folder)
    shutil.move(folder / "adapter", folder / "one")
    model = helpers.open_model(folder / "base", AUTO)
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=64, xlora_depth=1, adapters={"0": str(folder / "one")}
    )
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    scene.want = None
    return scene


def pooled(folder: Path) -> Scene:
    """QA-LoRA."""
    _, trained = test_lora_variants.pooled(folder, 6)
    (folder / "base" / "config.json").write_text('{"model_type": "toy"}')
    return Scene(folder, filled, on_tokens, on_tokens(trained))


def on_what_was_left(folder: Path, *, init: str) -> Scene:
    """Merged into the base that the initialisation moved."""
    scene = moved(folder, init=init, given="none")
    shutil.rmtree(folder / "base")
    shutil.move(folder / "residual", folder / "base")
    (folder / "base" / "config.json").write_text('{"model_type": "toy"}')
    scene.options["init_adapter"] = "none"
    return scene


def loftq(folder: Path) -> Scene:
    scene = of_release(folder, kind="init-loftq", release="0.10.0")
    (entry,) = (e for e in known.entries() if e.id == "init-loftq-0.10.0")
    shutil.rmtree(folder / "base")
    test_loftq.quantised(entry, folder / "corpus", folder / "base")
    scene.options["init_adapter"] = "none"
    return scene


def emptied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value[:0] for key, value in tensors.items()}


def flattened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.flatten() for key, value in tensors.items()}
