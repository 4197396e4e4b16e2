"""Tied embeddings: one tensor on disk that the model uses twice, at its input and at its output.

A delta of only one of the two makes them differ, so the other one is written as a tensor of its
own. They stay one where both change alike, or where the adapter was trained so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weft.core.dtypes import WEIGHTS
from weft.core.errors import Problem
from weft.plan._targets import Change, Targets
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.core.specs import Adapter, Checkpoint, Delta, TensorRef

# What output embeddings are called in transformers; a file says it where it holds one.
_HEAD_MODULES = ("lm_head", "embed_out", "output_projection")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_HEAD_INSIDE = ("ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True, slots=True)
class Tie:
    """The two names that one tensor has.

    Attributes:
        known: The model is known to have a head; else `head` only counts if an adapter names it.
        stored: The files hold the head as well, and the config says that it is not used.
    """

    embedding: str
    head: str
    known: bool
    stored: bool


def find_tie(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> Tie | None:
    """The tie of `base`, or None if its embeddings are (or can only be) separate tensors."""
    flag = config_value(base.config, "tie_word_embeddings")
    if flag is False:
        return None
    vocabulary = config_value(base.config, "vocab_size")
    tables = {
        name: ref
        for name, ref in base.tensors.items()
        if len(ref.shape) == 2 and ref.shape[0] == vocabulary and ref.dtype in WEIGHTS
    }
    heads = [name for name in tables if _module(name) in _HEAD_MODULES]
    others = [name for name in tables if name not in heads]
    if len(others) != 1 or len(heads) > 1:
        return None
    if heads:
        # Both are stored. Unless the config ties them all the same, they are what they are.
        return Tie(others[0], heads[0], True, True) if flag else None
    architecture = (base.config.get("architectures") or [""])[0] or ""
    named = [
        entry.target
        for adapter, _ in adapters
        for entry in adapter.entries
        if entry.parameter == "weight" and _module(entry.target) in _HEAD_MODULES
    ]
    known = architecture.endswith((*_WITH_HEAD, *_HEAD_INSIDE))
    if named:
        return Tie(others[0], named[0], known, False)
    # GPT-NeoX is the one family whose tied head is called otherwise.
    neox = base.config.get("model_type") == "gpt_neox"
    return Tie(others[0], "embed_out.weight" if neox else "lm_head.weight", known, False)


def _module(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def resolve(
    tie: Tie, targets: Targets, base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
) -> bool:
    """Decide what becomes of the tie, and rewrite `targets.changes` of its two names accordingly.

    Returns:
        Whether the output holds two separate embeddings now.
    """
    embedding = targets.changes.pop(tie.embedding, Change())
    head = targets.changes.pop(tie.head, Change())
    own_bases = [ref for ref in (embedding.base, head.base) if ref]
    if len(own_bases) == 2 and not same_bytes(*own_bases):
        targets.problems.append(
            Problem(
                f"{own_bases[0].name} and {own_bases[1].name} are one tied weight, and differ",
                "save the adapter again from a model whose embeddings are tied",
            )
        )
    shared = own_bases[0] if own_bases else None
    trained_tied = {n for n, (adapter, _) in enumerate(adapters) if adapter.ties_weights}
    own_rows = {n for n, delta in head.deltas if delta.kind == "trainable_tokens"}
    for_both = [
        (n, delta)
        for n, delta in embedding.deltas
        # PEFT gives a tied head the trained rows of the embedding, unless it has its own.
        if n in trained_tied or (delta.kind == "trainable_tokens" and n not in own_rows)
    ]
    # Of an adapter that was trained tied, the head's factors are the embedding's over again.
    for_head = [(n, d) for n, d in head.deltas if not (n in trained_tied and _has(for_both, n))]
    if for_head and all(n in trained_tied for n, _ in for_head):
        for_both += [(n, d) for n, d in for_head if not _has(embedding.deltas, n)]
        embedding.deltas += [(n, d) for n, d in for_head if not _has(embedding.deltas, n)]
        for_head = []
    head_deltas = sorted([*for_both, *for_head], key=lambda item: item[0])
    if _alike(embedding.deltas, head_deltas):
        if embedding.deltas or shared:
            targets.changes[tie.embedding] = Change(shared, embedding.deltas)
            if tie.stored:
                targets.changes[tie.head] = Change(shared, embedding.deltas)
        return False
    if not for_head and not tie.known:
        # An encoder has no head to keep as it was.
        targets.changes[tie.embedding] = Change(shared, embedding.deltas)
        return False
    _refuse_where_untying_changes_more(tie, targets, base)
    targets.changes[tie.embedding] = Change(shared, embedding.deltas)
    targets.changes[tie.head] = Change(shared, head_deltas)
    changed = tie.head if for_head else tie.embedding
    both = "both are written" if for_head and embedding.deltas else f"only {changed} changes"
    targets.notes.append(
        f"{tie.embedding} and {tie.head} were tied; {both}, so each is a tensor of its own now and "
        "tie_word_embeddings is false"
    )
    return True


def _refuse_where_untying_changes_more(tie: Tie, targets: Targets, base: Checkpoint) -> None:
    architecture = (base.config.get("architectures") or ["?"])[0]
    if base.config.get("is_encoder_decoder") or architecture.endswith(_HEAD_INSIDE):
        targets.problems.append(
            Problem(
                f"only one of {tie.embedding} and its tied output would change, and {architecture} "
                "cannot have the two apart",
                "train the adapter with ensure_weight_tying=True, or without the embedding",
            )
        )


def _has(deltas: Sequence[tuple[int, Delta]], number: int) -> bool:
    return any(n == number for n, _ in deltas)


def _alike(one: Sequence[tuple[int, Delta]], other: Sequence[tuple[int, Delta]]) -> bool:
    """The same changes, if need be by tensors that were saved twice with the same bytes."""
    if len(one) != len(other):
        return False
    for (n, mine), (m, yours) in zip(one, other, strict=True):
        if mine == yours:
            continue
        same_form = (n, mine.kind, mine.weight) == (m, yours.kind, yours.weight)
        if not same_form or mine.kind != "replace":
            return False
        if not same_bytes(mine.tensors[0][1], yours.tensors[0][1]):
            return False
    return True


def same_bytes(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors are equal to the bit.

    The one look at data that a plan takes: only where an adapter saved the two sides of a tie, and
    it decides what the output's tensors are.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return _digest(one) == _digest(other)


def _digest(ref: TensorRef) -> bytes:
    digest = hashlib.sha256()
    with Path(ref.file).open("rb") as file:
        file.seek(ref.start)
        left = ref.nbytes
        while left:
            data = file.read(min(left, 2**22))
            if not data:
                break
            digest.update(data)
            left -= len(data)
    return digest.digest()
