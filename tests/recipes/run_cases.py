"""Recipes on models with tokenizers, and on bare state dicts, that MergeKit has run as well.

Needs neither Weft nor MergeKit; the tokenizers are those of tests/plan/vocabulary_cases.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from parity_models import fingerprint, numbers, write_model
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).absolute().parents[1] / "plan"))

from vocabulary_cases import added, bpe

if TYPE_CHECKING:
    from collections.abc import Mapping

GOLDENS = "run_goldens.json"
TOKENIZERS = {
    "a": (bpe("a b c d e ab abc", added("<s>", 7), added("</s>", 8)), 9),
    "b": (bpe("a b c d e ab abd", added("<s>", 7), added("</s>", 8), added("<im>", 9)), 12),
    "c": (bpe("b a c d e f g bc", added("</s>", 8), added("<s>", 9)), 10),
}
_LINEAR = "merge_method: linear\ndtype: float32\nparameters: {weight: 0.5}\n"
_TIES = "merge_method: ties\ndtype: float32\nparameters: {weight: 0.5, density: 0.7}\n"
WITH_TOKENIZERS = {
    "union": f"{_LINEAR}models: [model: a, model: b, model: c]\ntokenizer_source: union\n",
    "union on a base": f"{_TIES}models: [model: b, model: c]\nbase_model: a\n"
    "tokenizer: {source: union}\n",
    "base": f"{_TIES}models: [model: b, model: c]\nbase_model: a\ntokenizer: {{source: base}}\n",
    "a model": "merge_method: slerp\ndtype: float32\nparameters: {t: 0.4}\n"
    "models: [model: a, model: b]\nbase_model: a\ntokenizer_source: b\n",
    "tokens": f"{_TIES}models: [model: b, model: c]\nbase_model: a\n"
    "tokenizer:\n  source: union\n  pad_to_multiple_of: 8\n  tokens:\n"
    "    <s>: {source: c, force: true}\n"
    "    <im>: {source: b}\n"
    "    abc: {source: {kind: model_token, model: b, token: abd}, force: true}\n"
    "    d: {source: {kind: model_token, model: c, token_id: 7}, force: true}\n"
    "    e: {source: {kind: zero}, force: true}\n",
    "slice bases": f"{_TIES}base_model: a\ntokenizer_source: union\nslices:\n"
    "  - base_model: b\n    sources: &all\n"
    "      - {model: a, layer_range: [0, 2]}\n"
    "      - {model: b, layer_range: [0, 2]}\n"
    "      - {model: c, layer_range: [0, 2]}\n"
    "  - base_model: c\n    sources: *all\n",
    "passthrough": "merge_method: passthrough\ndtype: float32\nslices:\n"
    "  - sources: [{model: a, layer_range: [0, 2]}]\n"
    "  - sources: [{model: c, layer_range: [1, 3]}]\ntokenizer_source: union\n",
}
STATE_DICTS = {
    "linear": "merge_method: linear\nmodels:\n"
    "  - {model: a.safetensors, parameters: {weight: 0.7}}\n"
    "  - {model: b.bin, parameters: {weight: 0.4}}\n"
    "  - {model: c.pth, parameters: {weight: 0.1}}\n",
    "ties": "merge_method: ties\nbase_model: c.pth\nmodels:\n"
    "  - {model: a.safetensors, parameters: {weight: 0.7, density: 0.4}}\n"
    "  - {model: b.bin, parameters: {weight: 0.4, density: 0.6}}\n",
    "slerp": "merge_method: slerp\nbase_model: b.bin\n"
    "models: [model: b.bin, model: a.safetensors]\n"
    "parameters: {t: [{filter: conv, value: 0.2}, {value: 0.7}]}\n",
    "model_stock": "merge_method: model_stock\nbase_model: c.pth\n"
    "models: [model: a.safetensors, model: b.bin]\n",
    # The first value counts, also for what looks like layers.
    "gradient": "merge_method: linear\nmodels:\n"
    "  - {model: a.safetensors, parameters: {weight: [0.7, 0.1]}}\n"
    "  - {model: b.bin, parameters: {weight: [0.2, 0.4, 0.9]}}\n",
}
_SOME = "dtype: float32\nmodels:\n  - {model: a.safetensors, parameters: {weight: 0.7}}\n"
_SOME += "  - {model: b.bin, parameters: {weight: 0.4}}\n"
# What not all of the state dicts have: left out, or made of those that have it.
PARTLY = {
    "intersection": ("--tensor-intersection", f"merge_method: linear\n{_SOME}"),
    "union": ("--tensor-union", f"merge_method: linear\n{_SOME}"),
    "intersection on a base": (
        "--tensor-intersection",
        f"merge_method: ties\nbase_model: c.pth\n{_SOME}",
    ),
    "union on a base": ("--tensor-union", f"merge_method: ties\nbase_model: c.pth\n{_SOME}"),
}
_SHAPES = {
    "encoder.conv_in.weight": (6, 3, 4, 4),
    "encoder.conv_in.bias": (6,),
    "encoder.down.0.block.1.norm.weight": (6,),
    "encoder.down.0.block.1.norm.running_var": (6,),
    "decoder.attn.to_q.weight": (12, 6),
    "decoder.positions": (1, 5, 12),
    "logit_scale": (),
}


def write_state_dicts(root: Path) -> None:
    """Three models of no architecture, each in another kind of file."""
    for number, (name, suffix) in enumerate((("a", "safetensors"), ("b", "bin"), ("c", "pth"))):
        tensors = {}
        for key, shape in _SHAPES.items():
            values = numbers(f"base {key}", shape, 0.02) + numbers(f"{number} {key}", shape, 0.01)
            tensors[key] = torch.from_numpy(np.asarray(values, np.float32)).reshape(shape)
        tensors["encoder.down.0.block.1.norm.num_batches_tracked"] = torch.tensor(17)
        tensors["decoder.mask"] = torch.ones(4, 4).tril().bool()
        file = root / f"{name}.{suffix}"
        save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)


def write_partly(root: Path) -> None:
    """Each of `a` and `b` lacks a tensor, and has one that the other lacks; `c` has all."""
    for number, (name, suffix) in enumerate((("a", "safetensors"), ("b", "bin"), ("c", "pth"))):
        tensors = {
            key: torch.from_numpy(numbers(f"{number} {key}", (4, 6), 0.02).astype(np.float32))
            for key in ("both.weight", "only_a.weight", "only_b.weight")
            if name == "c" or key in ("both.weight", f"only_{name}.weight")
        }
        file = root / f"{name}.{suffix}"
        save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)


def write_models(root: Path) -> None:
    """Three little Llamas, each with a vocabulary of its own."""
    for seed, (name, (files, rows)) in enumerate(TOKENIZERS.items(), 1):
        write_model(root / name, "llama", seed, vocabulary=rows)
        for file, content in files.items():
            (root / name / file).write_text(json.dumps(content), encoding="utf-8")


def told(tensors: Mapping[str, np.ndarray[Any, Any]], folder: Path) -> dict[str, Any]:
    """Fingerprints of all tensors; of tables, of the row of every token and of the padding."""
    file = folder / "tokenizer.json"
    found: dict[str, Any] = {}
    tokens: dict[str, int] = {}
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        tokens = dict(content["model"]["vocab"])
        tokens |= {each["content"]: each["id"] for each in content["added_tokens"]}
    for name, values in tensors.items():
        if tokens and ("embed_tokens" in name or "lm_head" in name):
            rows = {token: fingerprint(values[n]) for token, n in tokens.items()}
            padding = {f"padding {n}": fingerprint(r) for n, r in enumerate(values[len(tokens) :])}
            found[name] = rows | padding
        else:
            found[name] = fingerprint(values.astype(np.float64))
    return found
