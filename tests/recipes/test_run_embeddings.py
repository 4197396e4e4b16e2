"""Adapters of embeddings whose rows a recipe puts in another order: exact there, too.

The truth is float64 algebra, with the order of the rows written down by hand.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from running import HIDDEN, VOCABULARY, checkpoint, llama, random, run
from safetensors.torch import load_file, save_file

import weft

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

TABLE = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base` and `c`, in bfloat16: 40 rows, of which the first 38 are the same tokens."""
    for seed, name in ((None, "base"), (3, "c")):
        folder = checkpoint(tmp_path / name, llama(seed))
        vocab = {f"t{n}": n for n in range(38)} | {name: 38}  # and row 39 is padding
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
        content = {"version": "1.0", "added_tokens": [], "model": model}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def embedding_lora(folder: Path, seed: int, rms: float) -> dict[str, Tensor]:
    """A LoRA of rank 3 on both tables; what it adds to each, in float64."""
    A, B = random(3, VOCABULARY, seed=seed), random(HIDDEN, 3, seed=seed + 1)
    up, down = random(VOCABULARY, 3, seed=seed + 2), random(3, HIDDEN, seed=seed + 3)
    pairs = {TABLE: (B, A), HEAD: (up, down)}
    factors, found = {}, {}
    for name, (wide, thin) in pairs.items():
        wide *= rms / float((2 * wide @ thin).square().mean().sqrt())
        delta = 2 * wide.double() @ thin.double()
        found[name] = delta.T if name == TABLE else delta
    key = "base_model.model.model.embed_tokens.lora_embedding"
    factors |= {f"{key}_A": A, f"{key}_B": B}
    key = "base_model.model.lm_head"
    factors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    config |= {"target_modules": ["embed_tokens", "lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return found


def tables(root: Path, name: str) -> dict[str, Tensor]:
    stored = load_file(root / name / "model.safetensors")
    return {table: stored[table].double() for table in (TABLE, HEAD)}


def assert_close(found: Tensor, base: Tensor, change: Tensor) -> None:
    """`found` is base + change, but for the rounding of the sum: nothing of the change is lost."""
    off = float((found.double() - base - change).norm())
    assert off < 1e-6 * float(change.norm()) + 2.0**-24 * float(base.norm())


@pytest.mark.parametrize("padding", [0, 16])
def test_union(padding: int, root: Path) -> None:
    """38 common tokens, that of the base, that of c; and padding, which is the mean of all."""
    d = embedding_lora(root / "adapter", 1, rms=3e-5)
    pad = "  pad_to_multiple_of: 16\n" if padding else ""
    found = run(
        root,
        f"merge_method: task_arithmetic\nbase_model: base\nout_dtype: float32\nmodels:\n"
        "  - {model: base+adapter, parameters: {weight: 1000}}\n"
        "  - {model: c, parameters: {weight: 0.5}}\n"
        f"tokenizer:\n  source: union\n{pad}",
    )
    b, c = tables(root, "base"), tables(root, "c")
    for name in (TABLE, HEAD):
        nothing = torch.zeros(1, HIDDEN, dtype=torch.float64)
        base = torch.cat([b[name][:39], c[name][38:39]])
        # c takes the row of the token "base" from the base, and the others that of "c" from c.
        tuned = torch.cat([d[name][:39], nothing])
        other = torch.cat([c[name][:38] - b[name][:38], nothing, nothing])
        if padding:
            base, tuned, other = (
                torch.cat([each, each.mean(0).expand(8, -1)]) for each in (base, tuned, other)
            )
        assert found[name].shape == base.shape
        assert_close(found[name], base, 1000 * tuned + 0.5 * other)


def test_base(root: Path) -> None:
    """Row 39, which no token has, goes; the rest stay in their order."""
    d = embedding_lora(root / "adapter", 1, rms=3e-5)
    text = "merge_method: ties\nbase_model: base\nout_dtype: float32\ntokenizer_source: base\n"
    text += "parameters: {weight: 1, lambda: 1000}\nmodels: [model: base+adapter]\n"
    found, b = run(root, text), tables(root, "base")
    for name in (TABLE, HEAD):
        assert_close(found[name], b[name][:39], 1000 * d[name][:39])


def test_a_tokenizer_of_another_model(root: Path) -> None:
    """In the order of c: the base has no row for its last token, and both take that of c."""
    d, e = (embedding_lora(root / n, seed, rms=1e-4) for n, seed in (("d", 1), ("e", 9)))
    found = run(
        root,
        "merge_method: task_arithmetic\nbase_model: base+e\nout_dtype: float32\nmodels:\n"
        "  - {model: base+d:0.5+e, parameters: {weight: 1000}}\n"
        "  - {model: c+d, parameters: {weight: 2}}\ntokenizer_source: c\n",
    )
    b, c = tables(root, "base"), tables(root, "c")
    for name in (TABLE, HEAD):
        base = torch.cat([b[name] + e[name], c[name] + d[name]])[[*range(38), 78]]
        tuned = 0.5 * d[name][:39].clone()
        other = (c[name] + d[name] - b[name] - e[name])[:39]
        tuned[38] = other[38] = 0
        assert_close(found[name], base, 1000 * tuned + 2 * other)


def test_tokens_of_their_own(root: Path) -> None:
    """A forced row is the same for all; one that is made of two is the mean of their changes."""
    d = embedding_lora(root / "adapter", 1, rms=3e-5)
    found = run(
        root,
        "merge_method: task_arithmetic\nbase_model: base\nout_dtype: float32\nmodels:\n"
        "  - {model: base+adapter, parameters: {weight: 1000}}\n"
        "tokenizer:\n  source: base\n  tokens:\n"
        "    t3: {source: {kind: model_token, model: base+adapter, token: t5}, force: true}\n"
        "    t4: {source: {kind: zero}, force: true}\n",
    )
    b = tables(root, "base")
    for name in (TABLE, HEAD):
        base, change = b[name][:39].clone(), d[name][:39].clone()
        base[3], base[4] = (b[name] + d[name])[5], 0
        change[[3, 4]] = 0
        assert_close(found[name], base, 1000 * change)


def test_a_tokenizer_of_a_model_with_an_adapter(root: Path) -> None:
    """As that of the model that the two make when they are merged first, in float32."""
    embedding_lora(root / "adapter", 1, rms=1e-2)
    weft.merge("base", "adapter", output="merged", dtype="float32")
    text = "merge_method: linear\nout_dtype: float32\nmodels:\n"
    text += "  - {model: c, parameters: {weight: 1}}\n"
    text += "  - {model: %s, parameters: {weight: 3}}\ntokenizer_source: %s\n"
    found, first, without = (
        run(root, text % (name, name), out)
        for name, out in (("base+adapter", "one"), ("merged", "two"), ("base", "three"))
    )
    for name in (TABLE, HEAD):
        assert found[name].shape == (39, HIDDEN)
        assert float((found[name] - first[name]).abs().max()) < 2e-8
        assert float((found[name] - without[name]).abs().max()) > 1e-3
    for folder in ("one", "two"):
        tokenizer = json.loads((root / folder / "tokenizer.json").read_text())
        assert tokenizer["model"]["vocab"]["base"] == 38
        assert "c" not in tokenizer["model"]["vocab"]
