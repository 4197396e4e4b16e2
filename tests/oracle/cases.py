"""Kinds of adapters × models: what the tests of this folder go through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from helpers import MODELS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Case:
    """An adapter on a model.

    Attributes:
        name: Of the kind of adapter.
        model: A key of `MODELS`.
        config: Arguments of LoraConfig.
        rows: The vocabulary is resized to so many.
        apart: A tied model's embeddings become two tensors.
        unlike: Ends of the names of the tensors whose bits are not PEFT's. It rounds the ΔW of an
            embedding to the base's dtype before it adds it; it takes DoRA's norm of columns in
            float32; and it changes both ends of a tied model where the adapter changes one.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    rows: int | None = None
    apart: bool = False
    unlike: tuple[str, ...] = ()
    broken: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}-{self.model}"

    @property
    def auto(self) -> str:
        """The class of transformers that loads the model."""
        return MODELS[self.model].auto


def _linear(model: str, **config: Any) -> dict[str, Any]:
    return {"target_modules": list(MODELS[model].linear), **config}


_LLAMA = "model.embed_tokens.weight"
_ENDS = (_LLAMA, "lm_head.weight")
_BERT = "embeddings.word_embeddings.weight"
_GPT2 = ("transformer.wte.weight", "lm_head.weight")
_HEADS = ["embed_tokens", "lm_head"]
_SOME = {"target_modules": ["o_proj"]}  # something beside the embedding that is looked at
_SOME_GPT2 = {"target_modules": ["c_attn"]}
_DECODERS = ("llama", "gpt2", "qwen2", "qwen2-moe", "mixtral")
_WITH_BIASES = ("gpt2", "bert")

CASES = [
    *(Case("linear", model, _linear(model)) for model in (*_DECODERS, "bert")),
    *(
        Case("rslora", model, _linear(model, use_rslora=True, lora_alpha=4))
        for model in ("llama", "gpt2")
    ),
    *(
        Case(
            "patterns",
            model,
            _linear(
                model,
                rank_pattern={last: 5, r"(h|layers)\.1\." + first: 3},
                alpha_pattern={last: 5, r"(h|layers)\.1\." + first: 2},
                lora_alpha=4,
                use_rslora=model == "qwen2",
            ),
        )
        for model, first, last in (
            ("llama", "self_attn.q_proj", "down_proj"),
            ("gpt2", "attn.c_proj", "c_fc"),
            ("qwen2", "self_attn.v_proj", "o_proj"),
        )
    ),
    *(Case("dora", model, _linear(model, use_dora=True)) for model in ("llama", "qwen2", "bert")),
    Case(
        "dora",
        "gpt2",
        _linear("gpt2", use_dora=True),
        unlike=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
    Case(
        "lora-bias",
        "qwen2",
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True},
    ),
    *(Case("lora-bias", model, _linear(model, lora_bias=True)) for model in _WITH_BIASES),
    *(
        Case(f"bias-{which}", model, _linear(model, bias=which))
        for model in (*_WITH_BIASES, "qwen2")
        for which in ("all", "lora_only")
    ),
    Case("norms-saved", "llama", _linear("llama", modules_to_save=["norm"])),
    Case("norm-saved", "gpt2", _linear("gpt2", modules_to_save=["ln_f"])),
    Case("pooler-saved", "bert", {"target_modules": ["query"], "modules_to_save": ["pooler"]}),
    Case("head-lora", "llama", {"target_modules": ["o_proj", "lm_head"]}),
    Case("head-dora", "llama", {"target_modules": ["o_proj", "lm_head"], "use_dora": True}),
    Case("head-saved", "llama", {**_SOME, "modules_to_save": ["lm_head"]}),
    Case(
        "embedding-lora",
        "llama",
        {"target_modules": ["o_proj", "embed_tokens"]},
        unlike=(_LLAMA,),
    ),
    Case("embedding-lora", "bert", {"target_modules": ["word_embeddings"]}, unlike=(_BERT,)),
    Case(
        "positions-lora",
        "gpt2",
        {"target_modules": ["c_attn", "wpe"]},
        unlike=("transformer.wpe.weight",),
    ),
    Case(
        "embedding-dora",
        "llama",
        {"target_modules": ["embed_tokens"], "use_dora": True},
        unlike=(_LLAMA,),
    ),
    Case(
        "embedding-dora",
        "bert",
        {"target_modules": ["word_embeddings"], "use_dora": True},
        unlike=(_BERT,),
    ),
    Case("embedding-saved", "llama", {**_SOME, "modules_to_save": ["embed_tokens"]}),
    Case("tokens", "llama", {**_SOME, "trainable_token_indices": [90, 3, 111, 0]}),
    Case(
        "tokens",
        "bert",
        {
            "target_modules": ["query"],
            "trainable_token_indices": {"word_embeddings": [5, 2], "position_embeddings": [7]},
        },
    ),
    # --- tied
    Case("linear", "llama-tied", _linear("llama")),
    Case("tokens", "llama-tied", {**_SOME, "trainable_token_indices": [90, 3, 111, 0]}),
    Case(
        "tokens",
        "gpt2",
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [8, 1]}},
    ),
    Case(
        "embedding-lora",
        "llama-tied",
        {"target_modules": ["o_proj", "embed_tokens"]},
        apart=True,
        unlike=_ENDS,
    ),
    Case(
        "head-lora",
        "llama-tied",
        {"target_modules": ["o_proj", "lm_head"]},
        apart=True,
        unlike=_ENDS,
    ),
    Case(
        "both-lora",
        "llama-tied",
        {"target_modules": ["o_proj", "lm_head", "embed_tokens"]},
        apart=True,
        unlike=_ENDS,
    ),
    Case(
        "embedding-saved", "llama-tied", {**_SOME, "modules_to_save": ["embed_tokens"]}, apart=True
    ),
    Case("head-saved", "llama-tied", {**_SOME, "modules_to_save": ["lm_head"]}, apart=True),
    Case(
        "together-lora",
        "llama-tied",
        {"target_modules": ["o_proj", "embed_tokens"], "ensure_weight_tying": True},
        unlike=_ENDS,
    ),
    Case(
        "together-saved",
        "llama-tied",
        {**_SOME, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    Case("both-saved", "llama-tied", {**_SOME, "modules_to_save": _HEADS}, apart=True),
    Case("embedding-lora", "gpt2", {"target_modules": ["wte"]}, apart=True, unlike=_GPT2),
    Case("head-lora", "gpt2", {"target_modules": ["lm_head"]}, apart=True, unlike=_GPT2),
    Case("both-lora", "gpt2", {"target_modules": ["wte", "lm_head"]}, apart=True, unlike=_GPT2),
    Case("embedding-saved", "gpt2", {**_SOME_GPT2, "modules_to_save": ["wte"]}, apart=True),
    Case("head-saved", "gpt2", {**_SOME_GPT2, "modules_to_save": ["lm_head"]}, apart=True),
    *(
        Case(
            f"{name}-dora",
            "llama-tied",
            {"target_modules": targets, "use_dora": True, "ensure_weight_tying": together},
            apart=True,
            unlike=_ENDS,
        )
        for name, targets, together in (
            ("embedding", ["embed_tokens"], False),
            ("head", ["lm_head"], False),
            ("both", ["embed_tokens", "lm_head"], False),
            # The two norms run along different axes: the head's DoRA is not the embedding's.
            ("together", ["embed_tokens"], True),
        )
    ),
    Case(
        "tokens-and-head-lora",
        "llama-tied",
        {"target_modules": ["o_proj", "lm_head"], "trainable_token_indices": [90, 3]},
        apart=True,
        broken=True,
    ),
    *(
        Case(
            name,
            "llama-tied",
            {**_SOME, "trainable_token_indices": indices},
            apart=apart,
            unlike=_ENDS if apart else (),
        )
        for name, indices, apart in (
            ("tokens-of-both", {"embed_tokens": [90, 3], "lm_head": [90, 3]}, False),
            ("tokens-of-each", {"embed_tokens": [90, 3], "lm_head": [5]}, True),
            ("tokens-of-head", {"lm_head": [5, 4]}, True),
        )
    ),
    *(
        Case(
            f"together-{name}-from-head",
            model,
            {"target_modules": [other], **config, "ensure_weight_tying": True},
            unlike=unlike,
        )
        for model, other, ends in (("llama-tied", "o_proj", _ENDS), ("gpt2", "c_attn", _GPT2))
        for name, config, unlike in (
            ("lora", {"target_modules": [other, "lm_head"]}, ends),
            ("saved", {"modules_to_save": ["lm_head"]}, ()),
        )
    ),
    # PEFT knows the ends of a model by the names of Llama's: here it ties nothing.
    Case(
        "together-lora",
        "gpt2",
        {"target_modules": ["c_attn", "wte"], "ensure_weight_tying": True},
        apart=True,
        unlike=_GPT2,
    ),
    Case(
        "together-saved",
        "gpt2",
        {**_SOME_GPT2, "modules_to_save": ["wte"], "ensure_weight_tying": True},
        apart=True,
    ),
    # --- resized
    Case("resized", "llama", {"target_modules": ["o_proj"]}, rows=121),
    Case("resized", "llama-tied", {"target_modules": ["o_proj"]}, rows=121),
    Case("resized", "gpt2", {"target_modules": ["c_attn"]}, rows=121),
    Case(
        "resized-both-lora",
        "llama",
        {"target_modules": ["o_proj", "embed_tokens", "lm_head"]},
        rows=121,
        unlike=(_LLAMA,),
    ),
    Case(
        "resized-embedding-lora",
        "llama-tied",
        {"target_modules": ["o_proj", "embed_tokens"]},
        rows=121,
        apart=True,
        unlike=_ENDS,
    ),
    Case(
        "resized-head-lora",
        "llama-tied",
        {"target_modules": ["o_proj", "lm_head"]},
        rows=121,
        apart=True,
        unlike=_ENDS,
    ),
    Case(
        "resized-together-lora",
        "llama-tied",
        {"target_modules": ["o_proj", "embed_tokens"], "ensure_weight_tying": True},
        rows=121,
        unlike=_ENDS,
    ),
    *(
        Case(
            f"resized-{name}",
            model,
            {**(_SOME_GPT2 if model == "gpt2" else _SOME), **config},
            rows=121,
            apart=apart and model != "llama",
        )
        for model, wte in (
            ("llama", "embed_tokens"),
            ("llama-tied", "embed_tokens"),
            ("gpt2", "wte"),
        )
        for name, config, apart in (
            ("embedding-saved", {"modules_to_save": [wte]}, True),
            ("head-saved", {"modules_to_save": ["lm_head"]}, True),
            ("both-saved", {"modules_to_save": [wte, "lm_head"]}, True),
            ("tokens", {"trainable_token_indices": {wte: [115, 3]}}, False),
        )
    ),
]


def named(*ids: str) -> list[Case]:
    """The cases of these ids."""
    known = {case.id: case for case in CASES}
    return [known[name] for name in ids]


def each(cases: Sequence[Case] = CASES) -> pytest.MarkDecorator:
    """One test for each case."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)
