"""Tiny tokenizers written by hand, and recipes over them; needs neither Weft nor MergeKit.

Every model's embedding has one column, whose values tell model and row: `code(model, row)`.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

GOLDENS = "vocabulary_goldens.json"


def code(model: int, row: int) -> float:
    return float(1000 * (model + 1) + row)


# ------------------------------------------------------------------------------------ tokenizers

Files = dict[str, Any]  # name -> JSON, text or bytes


def added(content: str, number: int, *, special: bool = True, **more: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    normalized = not special
    entry = {"id": number, "content": content, **flags, "normalized": normalized} | more
    return entry | {"special": special}


def _file(model: dict[str, Any], tokens: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    content: dict[str, Any] = dict.fromkeys(parts)
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    return {"version": "1.0", "added_tokens": list(tokens), **content, "model": model}


def bpe(
    pieces: str, *tokens: dict[str, Any], config: dict[str, Any] | None = None, **more: Any
) -> Files:
    """`pieces` in order; those of two letters or more are merges of all but the last and that."""
    words = pieces.split()
    merges = [[word[:-1], word[-1]] for word in words if len(word) > 1 and word[0] != "<"]
    model = {"type": "BPE", "vocab": {w: n for n, w in enumerate(words)}, "merges": merges}
    model |= {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "dropout": None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
    return {"tokenizer.json": _file(model | more, tokens), "tokenizer_config.json": settings}


def wordpiece(pieces: str, *tokens: dict[str, Any]) -> Files:
    model = {"type": "WordPiece", "vocab": {w: n for n, w in enumerate(pieces.split())}}
    model |= {"unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    return {"tokenizer.json": _file(model, tokens), "tokenizer_config.json": settings}


def unigram(pieces: str, *tokens: dict[str, Any]) -> Files:
    vocab = [[w, -float(n)] for n, w in enumerate(pieces.split())]
    model = {"type": "Unigram", "vocab": vocab, "unk_id": 0, "byte_fallback": False}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    return {"tokenizer.json": _file(model, tokens), "tokenizer_config.json": settings}


def sentencepiece(pieces: str, config: dict[str, Any]) -> Files:
    """A tokenizer.model: `<0x…>` are bytes, other `<…>` control pieces, `!…` user-defined."""
    kinds = {"<unk>": 2, "<0x": 6, "<": 3, "!": 4, "": 1}

    def field_of(number: int, raw: bytes) -> bytes:
        return bytes([number << 3 | 2, len(raw)]) + raw

    proto = b""
    for number, piece in enumerate(pieces.split()):
        kind = next(kind for start, kind in kinds.items() if piece.startswith(start))
        entry = field_of(1, piece.encode()) + b"\x15" + struct.pack("<f", -number)
        proto += field_of(1, entry + bytes([3 << 3, kind]))
    trainer = bytes([3 << 3, 2])  # model_type: BPE
    proto += field_of(2, trainer)
    return {"tokenizer.model": proto, "tokenizer_config.json": config}


def write(folder: Path, files: Files, rows: int) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": rows}
    for name, content in ({"config.json": config} | files).items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


# ----------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One recipe.

    Attributes:
        models: Tokenizer files and the rows of the embedding, by name.
        tokenizer: As in the YAML, models by name.
        base: Of the recipe.
        unordered: Tokens that MergeKit numbers in another order on each run.
    """

    models: dict[str, tuple[Files, int]]
    tokenizer: dict[str, Any]
    base: str | None = None
    unordered: frozenset[str] = field(default_factory=frozenset)


_A = bpe("a b c d e ab abc", added("<s>", 7), added("</s>", 8))
_B = bpe("a b c d e ab abd", added("<s>", 7), added("</s>", 8), added("<im>", 9))
_C = bpe("b a c d e f g bc", added("</s>", 8), added("<s>", 9))
_MIXED = {"a": (_A, 9), "b": (_B, 10), "c": (_C, 10)}
_NEW_OF_C = frozenset({"f", "g", "bc"})
_QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
_QWEN |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_QWEN_TOKENS = (added("<|endoftext|>", 7), added("<|im_start|>", 8), added("<|im_end|>", 9))
_LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
_LLAMA |= {"unk_token": "<unk>"}
_BYTES = " ".join(f"<0x{n:02X}>" for n in range(4))
_DECODED = {
    "added_tokens_decoder": {
        "7": {k: v for k, v in added("<s>", 7).items() if k != "id"},
        "8": {k: v for k, v in added("<tool>", 8, special=False, lstrip=True).items() if k != "id"},
    }
}
_OLD = {
    **bpe("a b c d e ab abc", added("<s>", 7)),
    "added_tokens.json": {"<tool>": 8, "[PAD]": 9},
    "special_tokens_map.json": {"pad_token": "[PAD]", "bos_token": "<s>"},
}


def _llama(pieces: str, *tokens: dict[str, Any]) -> Files:
    whole = f"<unk> <s> </s> {_BYTES} {pieces}"
    first = (added("<unk>", 0), added("<s>", 1), added("</s>", 2))
    return bpe(whole, *first, *tokens, config=_LLAMA, byte_fallback=True, unk_token="<unk>")


def _llama_with_decoder() -> Files:
    files = _llama("▁ a b ▁a ▁ab", added("<pad>", 12))
    tokens = files["tokenizer.json"]["added_tokens"]
    decoder = {t["id"]: {k: v for k, v in t.items() if k != "id"} for t in tokens}
    return files | {"tokenizer_config.json": _LLAMA | {"added_tokens_decoder": decoder}}


def _model_token(model: str, **token: Any) -> dict[str, Any]:
    return {"kind": "model_token", "model": model, **token}


CASES = {
    "union of equals": Case({"a": (_A, 9), "b": (_A, 9)}, {"source": "union"}),
    "union on a base": Case(_MIXED, {"source": "union"}, "a", _NEW_OF_C),
    "union without base": Case(_MIXED, {"source": "union"}, None, _NEW_OF_C),
    "union on a base that has all": Case({"b": (_B, 10), "a": (_A, 9)}, {"source": "union"}, "b"),
    "base": Case(_MIXED, {"source": "base"}, "c"),
    "a model": Case(_MIXED, {"source": "b", "pad_to_multiple_of": 8}, "a"),
    "tokens": Case(
        _MIXED,
        {
            "source": "a",
            "pad_to_multiple_of": 4,
            "tokens": {
                "<im>": {"source": "b"},
                "abd": {"source": {"kind": "zero"}},
                "<new>": {"source": _model_token("c", token="bc")},
                "<newer>": {"source": _model_token("b", token_id=2)},
                "<s>": {"source": "b", "force": True},
                "e": {"source": {"kind": "zero"}, "force": True},
                "c": {"source": _model_token("a", token="d"), "force": True},
                "a": {"source": _model_token("a", token="d")},
            },
        },
        "a",
    ),
    "padded rows": Case(
        {
            "base": (bpe("a b c d e ab abc", *_QWEN_TOKENS, config=_QWEN), 16),
            "tuned": (
                bpe("a b c d e ab abc", *_QWEN_TOKENS, added("<tool>", 10), config=_QWEN),
                24,
            ),
        },
        {"source": "union"},
        "base",
    ),
    "stripped base": Case({"b": (_B, 9), "a": (_A, 9)}, {"source": "base"}, "b"),
    "stripped pieces": Case(
        {"b": (bpe("a b c d e ab abc z"), 7), "a": (_A, 9)}, {"source": "union"}, "b"
    ),
    "stripped in union": Case(
        {
            "b": (
                bpe("a b c", added("<s>", 3), added("[PAD]", 4), config={"pad_token": "[PAD]"}),
                4,
            ),
            "a": (bpe("a b d", added("<s>", 3), added("[PAD]", 4)), 5),
        },
        {"source": "union"},
        "b",
    ),
    "special only in the config": Case(
        {
            "a": (
                _A
                | {"tokenizer_config.json": _A["tokenizer_config.json"] | {"pad_token": "[PAD]"}},
                10,
            )
        }
        | {"b": (_B, 10)},
        {"source": "union"},
        "a",
    ),
    "added tokens in the config": Case(
        {"a": (bpe("a b c d e ab abc", added("<s>", 7), config=_DECODED), 9), "b": (_B, 10)},
        {"source": "union"},
        "a",
    ),
    "old files": Case({"a": (_OLD, 10), "b": (_B, 10)}, {"source": "union"}, "b"),
    "old files as base": Case({"a": (_OLD, 10), "b": (_B, 10)}, {"source": "union"}, "a"),
    "a piece that another adds": Case(
        {"a": (_A, 9), "b": (bpe("a b c", added("ab", 3, special=False), added("<s>", 4)), 5)},
        {"source": "union"},
        "a",
    ),
    "wordpiece": Case(
        {
            "a": (wordpiece("[PAD] [UNK] a b ##a ##b", added("[PAD]", 0), added("[UNK]", 1)), 6),
            "b": (wordpiece("[UNK] [PAD] a b ##a ##c", added("[UNK]", 0), added("[PAD]", 1)), 6),
        },
        {"source": "union"},
    ),
    "unigram": Case(
        {
            "a": (unigram("<unk> ▁a b ▁ab", added("<unk>", 0), added("<x>", 4)), 5),
            "b": (unigram("<unk> b ▁a ▁ac", added("<unk>", 0), added("<y>", 4)), 6),
        },
        {"source": "union", "pad_to_multiple_of": 4},
        "a",
    ),
    "llama": Case(
        {
            "a": (_llama("▁ a b ▁a ▁ab", added("<pad>", 12)), 13),
            "b": (_llama("▁ b a ▁a ▁aa", added("<|im_start|>", 12), added("<|im_end|>", 13)), 14),
        },
        {"source": "union"},
        "a",
    ),
    "llama with added tokens in the config": Case(
        {
            "a": (_llama_with_decoder(), 13),
            "b": (_llama("▁ b a ▁a ▁aa", added("<|im_start|>", 12), added("<|im_end|>", 13)), 14),
        },
        {"source": "union"},
        "a",
    ),
    "sentencepiece": Case(
        {
            "a": (sentencepiece(f"<unk> <s> </s> {_BYTES} ▁ a b ▁a ▁ab !x", _LLAMA), 13),
            "b": (_llama("▁ b a ▁a ▁aa", added("<pad>", 12)), 13),
        },
        {"source": "union", "tokens": {"<new>": {"source": {"kind": "zero"}}}},
        "a",
    ),
    "gpt2 files": Case(
        {
            "a": (
                {
                    "vocab.json": {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "<|endoftext|>": 4},
                    "merges.txt": "#version: 0.2\na b\n",
                    "tokenizer_config.json": {
                        "tokenizer_class": "GPT2Tokenizer",
                        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
                    },
                },
                5,
            ),
            "b": (_A, 9),
        },
        {"source": "a", "tokens": {"</s>": {"source": "b"}}},
        "a",
    ),
    "bert files": Case(
        {
            "a": (
                {
                    "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n\u2028\n##a\n",
                    "tokenizer_config.json": {
                        "tokenizer_class": "BertTokenizer",
                        **{f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep")},
                        "mask_token": "[MASK]",
                    },
                },
                9,
            ),
            "b": (wordpiece("[UNK] [PAD] a b ##a c", added("[UNK]", 0), added("[PAD]", 1)), 6),
        },
        {"source": "union"},
        "a",
    ),
}
