"""Tiny models made from configs, adapters of random values, and the arithmetic that they should do.

Nothing here takes a formula from Weft: `exact` works in float64 from the files alone, and bounds
what float32 arithmetic may add to it. Importing this skips the test module if PEFT is not there.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.utils.logging.disable_progress_bar()

DTYPES = ("bfloat16", "float16", "float32")
VOCABULARY = 112

# What PEFT and transformers say of the cases that are built here on purpose.
WARNINGS = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Model with `tie_word_embeddings=True`:UserWarning",
    "ignore:You have requested `ensure_weight_tying`, but no tied modules are added:UserWarning",
    "ignore:Input and output embeddings are no longer tied after merging:UserWarning",
    "ignore:fan_in_fan_out is set to (True|False) but the target module is:UserWarning",
    "ignore:Adapter 'default'. [0-9]+ LoRA tensor.*lora_B.bias",  # a false alarm of PEFT's
)


# ----------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Tiny:
    """A model of a few thousand weights.

    Attributes:
        build: Makes it, uninitialised values and all.
        auto: The class of transformers that loads it.
        linear: Names of the modules that LoRA takes as matrices; one of them at least is square.
        embedding: Tensor name of the input embedding.
        head: Module name of the output embedding, if there is one.
    """

    build: Callable[[], Any]
    auto: str
    linear: tuple[str, ...]
    embedding: str
    head: str | None = "lm_head"


_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 48,
}
_BERT_LINEAR = ("query", "key", "value", "dense")


def _llama(*, tied: bool) -> Any:
    config = transformers.LlamaConfig(**_DECODER, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=48, n_embd=64, n_layer=2, n_head=4
    )
    return transformers.GPT2LMHeadModel(config)


def _qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_DECODER))


def _qwen2_moe() -> Any:
    config = transformers.Qwen2MoeConfig(
        **_DECODER,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def _mixtral() -> Any:
    config = transformers.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


# What the matrices of an expert are called on disk.
EXPERTS = {"mixtral": ("w1", "w2", "w3"), "qwen2-moe": _MLP}

MODELS = {
    "llama": Tiny(
        lambda: _llama(tied=False),
        "AutoModelForCausalLM",
        _ATTENTION + _MLP,
        "model.embed_tokens.weight",
    ),
    "llama-tied": Tiny(
        lambda: _llama(tied=True),
        "AutoModelForCausalLM",
        _ATTENTION + _MLP,
        "model.embed_tokens.weight",
    ),
    "gpt2": Tiny(
        _gpt2, "AutoModelForCausalLM", ("c_attn", "c_proj", "c_fc"), "transformer.wte.weight"
    ),
    "qwen2": Tiny(_qwen2, "AutoModelForCausalLM", _ATTENTION + _MLP, "model.embed_tokens.weight"),
    "qwen2-moe": Tiny(
        _qwen2_moe,
        "AutoModelForCausalLM",
        (*_ATTENTION, *_MLP, "shared_expert_gate"),
        "model.embed_tokens.weight",
    ),
    "mixtral": Tiny(_mixtral, "AutoModelForCausalLM", _ATTENTION, "model.embed_tokens.weight"),
    "bert": Tiny(
        lambda: transformers.BertModel(transformers.BertConfig(**_BERT)),
        "AutoModel",
        _BERT_LINEAR,
        "embeddings.word_embeddings.weight",
        None,
    ),
    "bert-classifier": Tiny(
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT)),
        "AutoModelForSequenceClassification",
        _BERT_LINEAR,
        "bert.embeddings.word_embeddings.weight",
        None,
    ),
}


def randomise(model: Any, seed: int = 0) -> None:
    """Values that show every change: biases that are not zero, norms that are not one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() > 1:
                value.copy_(0.15 * noise)
            else:
                value.copy_((0 if name.endswith("bias") else 1) + 0.1 * noise)


def save_base(
    model: str, dtype: str, folder: Path, *, max_shard_size: str = "5GB", bare: bool = False
) -> Path:
    """A checkpoint of the tiny `model`.

    Args:
        model: A key of `MODELS`.
        dtype: Of every weight.
        folder: Where it goes.
        max_shard_size: As transformers takes it.
        bare: Without the prefix of the model inside the one with a head, as the files of the
            original GPT-2 and BERT are.
    """
    made = MODELS[model].build()
    randomise(made)
    made = made.to(getattr(torch, dtype))
    made.save_pretrained(folder, max_shard_size=max_shard_size)
    if bare:
        prefix = made.base_model_prefix + "."
        tensors = {name.removeprefix(prefix): value for name, value in load(folder).items()}
        if model == "gpt2":  # whose file holds the causal masks, and whose config says no tie
            config = config_of(folder)
            del config["tie_word_embeddings"]
            (folder / "config.json").write_text(json.dumps(config))
            mask = torch.ones(48, 48).tril().reshape(1, 1, 48, 48)
            tensors |= {f"h.{n}.attn.bias": mask.clone() for n in range(2)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint or adapter; none may be there twice."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, dtype and shape included."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


def open_model(folder: Path, auto: str, dtype: str = "auto", **kwargs: Any) -> Any:
    """The checkpoint in `folder`, for inference."""
    if "moe" in config_of(folder)["model_type"] or "mixtral" in config_of(folder)["model_type"]:
        kwargs["experts_implementation"] = "eager"  # the others have no float64
    return getattr(transformers, auto).from_pretrained(folder, dtype=dtype, **kwargs)


def logits(model: Any) -> Tensor:
    """What the model makes of four fixed sentences that use every token of the vocabulary."""
    tokens = torch.arange(VOCABULARY).reshape(4, -1)
    with torch.no_grad():
        out = model(input_ids=tokens)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


# --------------------------------------------------------------------------------------- adapters


def train(
    base: Path,
    auto: str,
    config: Mapping[str, Any],
    *,
    rows: int | None = None,
    seed: int = 1,
    tie: bool = True,
    **kwargs: Any,
) -> Any:
    """A PEFT model on `base`, its adapter full of random values: a training run in no time.

    Args:
        base: Folder of the base.
        auto: The class of transformers that loads it.
        config: Arguments of LoraConfig.
        rows: Resize the vocabulary to so many first.
        seed: Of the values.
        tie: With `ensure_weight_tying`, give the head the embedding's factors, as training in
            float32 does. On a 16-bit base PEFT's are copies, which training makes differ.
        kwargs: For `from_pretrained`.
    """
    model = open_model(base, auto, **kwargs)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                generator = torch.Generator().manual_seed(seed + 100)
                shape = (rows - VOCABULARY, module.weight.shape[1])
                module.weight[VOCABULARY:] = 0.15 * torch.randn(shape, generator=generator)
    config = {"r": 8, "lora_alpha": 12, **copy.deepcopy(config)}  # PEFT writes into its lists
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not value.requires_grad:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if ".lora_magnitude_vector" in name:
                value.mul_(1 + 0.2 * noise)
            elif ".lora_" in name:
                value.copy_(0.15 * noise)
            else:
                value.add_(0.1 * noise)
        if config.get("ensure_weight_tying") and tie:
            _tie(model.get_input_embeddings(), model.get_output_embeddings())
    return model.eval()


def make_adapter(
    base: Path, auto: str, folder: Path, *, config: Mapping[str, Any], **kwargs: Any
) -> Path:
    """`train`, and save as PEFT does."""
    train(base, auto, config, **kwargs).save_pretrained(folder)
    return folder


def _tie(embedding: Any, head: Any) -> None:
    if hasattr(head, "lora_A"):
        head.lora_A["default"].weight.copy_(embedding.lora_embedding_B["default"].T)
        head.lora_B["default"].weight.copy_(embedding.lora_embedding_A["default"].T)


def open_peft(
    base: Path, auto: str, adapter: Path, *, rows: int | None = None, **kwargs: Any
) -> Any:
    """The base with the adapter on it, unmerged, as PEFT loads the two."""
    model = open_model(base, auto, **kwargs)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """An adapter written by hand; names are those of the model, without PEFT's prefix."""
    folder.mkdir()
    named = {f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def write_expert_adapter(base: Path, folder: Path, *, names: Sequence[str]) -> Path:
    """LoRA on every expert of a mixture, one matrix each, as models before transformers 5 had them.

    Args:
        base: Folder of the base, which has them so on disk.
        folder: Where the adapter goes.
        names: Of the matrices of an expert.
    """
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, W in load(base).items():
        if name.split(".")[-2] in names:
            for factor, shape in (("A", (4, W.shape[1])), ("B", (W.shape[0], 4))):
                value = 0.15 * torch.randn(shape, generator=generator)
                tensors[name.replace(".weight", f".lora_{factor}.weight")] = value
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(names)}
    return write_adapter(folder, tensors, config)


def peft_merge(base: Path, auto: str, adapter: Path, folder: Path, **kwargs: Any) -> Path:
    """PEFT's own merge, with its defaults, saved by transformers."""
    open_peft(base, auto, adapter, **kwargs).merge_and_unload().save_pretrained(folder)
    return folder


def weft_merge(base: Path, adapters: Path | Sequence[str], folder: Path, **kwargs: Any) -> Path:
    adapters = [str(a) for a in ([adapters] if not isinstance(adapters, list) else adapters)]
    weft.merge(base, adapters, output=folder, threads=2, **kwargs)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    name = "adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json"
    return json.loads((folder / name).read_text())


# ---------------------------------------------------------------------------------- what is exact

_UNIT = 2.0**-24  # half a unit in the last place of float32
_PRECISION = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}
_CONV1D = ("c_attn", "c_proj", "c_fc")


def gamma(operations: int) -> float:
    """Higham's γₙ: the relative error that n float32 operations in a row can have."""
    return operations * _UNIT / (1 - operations * _UNIT)


@dataclass
class Exact:
    """A tensor in float64, and how far from it float32 arithmetic may end before it is rounded."""

    value: Tensor
    slack: Tensor


@dataclass
class _Sum:
    """W, and Σ weight · ΔW on its way."""

    base: Tensor
    delta: Tensor
    size: Tensor
    slack: Tensor
    count: int = 0
    verbatim: Tensor | None = None


@dataclass
class _Module:
    A: Tensor | None = None
    B: Tensor | None = None
    transposed: bool = False
    parts: dict[str, Tensor] = field(default_factory=dict)


def exact(
    base: Mapping[str, Tensor],
    adapters: Sequence[tuple[Path, float]],
    *,
    rename: Callable[[str], str] = str,
    tied: Mapping[str, str] | None = None,
) -> dict[str, Exact]:
    """W + Σ weight · ΔW in float64, for every tensor that an adapter's file says something of.

    Args:
        base: The tensors of the base's files.
        adapters: Folders and weights.
        rename: Name of a tensor in the adapter's model -> its name in the base.
        tied: Name of a tensor that the base does not have -> name of the one that it is.
    """
    sums: dict[str, _Sum] = {}
    for folder, weight in adapters:
        config = config_of(folder)
        modules = _modules(load(folder))
        changing = list(modules.items())
        for head, embedding in (tied or {}).items():
            # PEFT gives the head of a tied model the trained rows of the embedding.
            rows = modules[embedding.removesuffix(".weight")].parts.get("rows")
            name = head.removesuffix(".weight")
            if rows is not None and name in modules and "rows" not in modules[name].parts:
                changing.append((name, _Module(parts={"rows": rows})))
        for module, found in changing:
            for parameter, (W, value, slack, whole) in _changes(
                module, found, config, base, rename, tied or {}
            ).items():
                name = rename(f"{module}.{parameter}")
                delta = value - W
                if name not in sums:
                    zero = torch.zeros_like(W)
                    sums[name] = _Sum(W, zero, W.abs(), zero.clone())
                total = sums[name]
                total.base = W
                total.delta = total.delta + weight * delta
                total.size = total.size + abs(weight) * delta.abs()
                total.slack = total.slack + abs(weight) * slack
                total.count += 1
                total.verbatim = value if whole and weight == 1 and total.count == 1 else None
    return {name: _finish(total) for name, total in sums.items()}


def _finish(total: _Sum) -> Exact:
    if total.verbatim is not None:
        return Exact(total.verbatim, torch.zeros_like(total.verbatim))
    slack = total.slack + gamma(total.count + 2) * total.size
    return Exact(total.base + total.delta, slack)


_ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "B_bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
    "token_adapter.base_layer.weight": "own_base",
    "base_layer.weight": "own_base",
    "base_layer.bias": "bias",
    "modules_to_save.weight": "weight",  # said twice, if the vocabulary was resized
    "original_module.weight": "unused",
}


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, _Module]:
    modules: dict[str, _Module] = defaultdict(_Module)
    for key, value in tensors.items():
        path = key.removeprefix("base_model.model.")
        end = next((end for end in _ROLES if path.endswith("." + end)), None)
        if end:
            module, role = path.removesuffix("." + end), _ROLES[end]
        else:
            module, _, role = path.rpartition(".")
        found = modules[module]
        if role in ("A", "embedding_A"):
            found.A = value.double()
            found.transposed = role != "A" or module.rpartition(".")[2] in _CONV1D
        elif role in ("B", "embedding_B"):
            found.B = value.double()
        elif role != "unused":
            found.parts[role] = value.double()
    return modules


def _scaling(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _changes(
    module: str,
    found: _Module,
    config: Mapping[str, Any],
    base: Mapping[str, Tensor],
    rename: Callable[[str], str],
    tied: Mapping[str, str],
) -> dict[str, tuple[Tensor, Tensor, Tensor, bool]]:
    """Parameter -> W, W′, the slack of W′, and whether W′ comes from the file as it is."""

    def weight_of(parameter: str) -> Tensor:
        name = rename(f"{module}.{parameter}")
        return base[tied.get(name, name)].double()

    changes: dict[str, tuple[Tensor, Tensor, Tensor, bool]] = {}
    parts = dict(found.parts)
    own_base = parts.pop("own_base", None)
    if found.A is not None and found.B is not None:
        W = weight_of("weight") if own_base is None else own_base
        rank = found.A.shape[0]
        scaling = _scaling(module, rank, config)
        product = scaling * (found.B @ found.A)
        size = abs(scaling) * (found.B.abs() @ found.A.abs())
        if found.transposed:
            product, size = product.T, size.T
        if "magnitude" in parts:
            value, slack = _dora(W, product, size, parts.pop("magnitude"), rank, module, found)
        else:
            value, slack = W + product, gamma(rank + 2) * size
        changes["weight"] = (W, value, slack, False)
        if "B_bias" in parts:
            bias = scaling * parts.pop("B_bias")
            b = weight_of("bias")
            changes["bias"] = (b, b + bias, gamma(3) * bias.abs(), False)
    if "rows" in parts:
        W = weight_of("weight") if own_base is None else own_base
        indices = config["trainable_token_indices"]
        if isinstance(indices, dict):  # a tied head's are the embedding's
            own = [v for k, v in indices.items() if f".{module}".endswith("." + k)]
            (indices,) = own or indices.values()
        value = W.clone()
        value[indices] = parts.pop("rows")
        changes["weight"] = (W, value, torch.zeros_like(W), True)
    for parameter, value in parts.items():
        name = rename(f"{module}.{parameter}")
        known = base.get(tied.get(name, name))
        W = known.double() if known is not None and known.shape == value.shape else value
        changes[parameter] = (W, value, torch.zeros_like(value), True)
    return changes


def _dora(
    W: Tensor, product: Tensor, size: Tensor, m: Tensor, rank: int, module: str, found: _Module
) -> tuple[Tensor, Tensor]:
    """M / ‖V‖ · V: over the inputs of a matrix, over the vocabulary of an embedding."""
    V = W + product
    error = gamma(rank + 4) * (W.abs() + size)
    axis = 0 if found.transposed else 1
    norm = V.norm(dim=axis, keepdim=True)
    shape = (1, -1) if axis == 0 else (-1, 1)
    factor = m.reshape(shape) / norm
    relative = error.norm(dim=axis, keepdim=True) / norm + gamma(V.shape[axis] + 4)
    return factor * V, factor.abs() * (error + V.abs() * (relative + gamma(4)))


def unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of the numbers of `dtype` around `values`."""
    precision, smallest = _PRECISION[dtype]
    exponent = torch.frexp(values)[1] - 1
    exponent = torch.where(values == 0, smallest, exponent.clamp(min=smallest))
    return torch.ldexp(torch.ones_like(values), exponent - (precision - 1))


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 -> the nearest number of `dtype`, ties to even, in float64.

    (Torch goes from float64 to bfloat16 by way of float32, and so rounds twice.)
    """
    size = unit(values, dtype)
    return torch.round(values / size) * size


def check_rounding(actual: Tensor, want: Exact, name: str) -> int:
    """`actual` is the float64 value rounded once; how many elements the slack has tipped over.

    Every element lies between what the two ends of the slack round to. So it is the correctly
    rounded value or, where the exact one is next to the middle of two numbers, its neighbour;
    unless W and ΔW cancel so far that what is left is no more than the error of float32.
    """
    assert actual.shape == want.value.shape, name
    found = actual.double()
    low, high = (rounded(want.value + sign * want.slack, actual.dtype) for sign in (-1, 1))
    outside = (found < low) | (found > high) | found.isnan()
    assert not outside.any(), (
        f"{name}: {int(outside.sum())} of {found.numel()} elements, first {found[outside][0]:.9g} "
        f"for {want.value[outside][0]:.9g} ± {want.slack[outside][0]:.1e}"
    )
    nearest = rounded(want.value, actual.dtype)
    off = found != nearest
    if actual.dtype != torch.float32:
        step = unit(nearest, actual.dtype)
        far = ((found - nearest).abs() > step) & (want.slack < step / 2)
        assert not far.any(), name
    return int(off.sum())
