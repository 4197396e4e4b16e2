"""Tied embeddings: one tensor on disk that the model uses twice, at its input and at its output.

A delta of only one of the two makes them differ, so the other one is written as a tensor of its
own. They stay one where both change alike, or where the adapter was trained so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.core.dtypes import WEIGHTS
from weft.core.errors import Problem
from weft.core.names import in_layer
from weft.formats.adapters._peft_config import trains_originals
from weft.formats.checkpoint import bits, same_bytes
from weft.plan._targets import Change, Targets
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.core.specs import Adapter, Checkpoint, Delta, Shape, TensorRef

    _Owned = tuple[int, Delta]  # with the number of the adapter that brings it

# What output embeddings are called in transformers; a file says it where it holds one.
HEADS = ("lm_head", "embed_out", "output_projection")
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
    tables = {name: ref for name, ref in _tables(base).items() if ref.dtype in WEIGHTS}
    heads = [name for name in tables if _module(name) in HEADS]
    others = [name for name in tables if name not in heads]
    if len(others) != 1 or len(heads) > 1:
        return None
    if heads:
        # Both are stored. Unless the config ties them all the same, they are what they are; where
        # it is silent, equal bytes tell a class that ties them (old GPT-2 files).
        tied = flag or same_bytes(tables[others[0]], tables[heads[0]])
        return Tie(others[0], heads[0], True, True) if tied else None
    architecture = (base.config.get("architectures") or [""])[0] or ""
    named = [
        entry.target
        for adapter, _ in adapters
        for entry in adapter.entries
        if entry.parameter == "weight" and _module(entry.target) in HEADS
    ]
    known = architecture.endswith((*_WITH_HEAD, *_HEAD_INSIDE))
    if named:
        return Tie(others[0], named[0], known, False)
    # GPT-NeoX is the one family whose tied head is called otherwise.
    neox = base.config.get("model_type") == "gpt_neox"
    return Tie(others[0], "embed_out.weight" if neox else "lm_head.weight", known, False)


def untold(base: Checkpoint, targets: Targets) -> list[Problem]:
    """Changes of a table of the vocabulary, where the config ties tables and not which."""
    tables = _tables(base)
    if not config_value(base.config, "tie_word_embeddings") or len(tables) < 2:
        return []
    return [
        Problem(
            f"{name} would change, and {base.given} ties its embeddings without saying which of "
            f"{', '.join(tables)}",
            "train the adapter without the embeddings",
        )
        for name in tables
        if name in targets.changes
    ]


def _tables(base: Checkpoint) -> dict[str, TensorRef]:
    """The matrices with a row for each token."""
    vocabulary = config_value(base.config, "vocab_size")
    return {
        name: ref
        for name, ref in base.tensors.items()
        if has_row_for_each(vocabulary, name, ref.shape)
    }


def has_row_for_each(vocabulary: Any, name: str, shape: Shape) -> bool:
    """Whether a matrix has a row for each token; one in a layer is as high by chance."""
    return len(shape) == 2 and shape[0] == vocabulary and not in_layer(name)


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
    targets.warnings += _lost_end(tie, embedding, head, adapters)
    own_bases = [ref for ref in (embedding.base, head.base) if ref]
    if len(own_bases) == 2 and not same_bytes(*own_bases):
        # The adapter brings both, and they are not one weight any more.
        targets.changes |= {tie.embedding: embedding, tie.head: head}
        return _untie(tie, targets, base, "both are written")
    shared = own_bases[0] if own_bases else None
    own_rows = {n for n, delta in head.deltas if delta.kind == "trainable_tokens"}
    # PEFT gives a tied head the trained rows of the embedding, unless it has its own.
    rows = [
        item
        for item in embedding.deltas
        if item[1].kind == "trainable_tokens" and item[0] not in own_rows
    ]
    here = _joined(embedding.deltas, _for_both(head.deltas))
    there = _joined(head.deltas, [*_for_both(embedding.deltas), *rows])
    only_head = [item for item in head.deltas if item not in here]
    if _alike(here, there):
        if here or shared:
            targets.changes[tie.embedding] = Change(shared, deltas=here)
            if tie.stored:
                targets.changes[tie.head] = Change(shared, deltas=here)
        return False
    if not only_head and not tie.known:
        # An encoder has no head to keep as it was.
        targets.changes[tie.embedding] = Change(shared, deltas=here)
        return False
    targets.changes[tie.embedding] = Change(shared, deltas=here)
    targets.changes[tie.head] = Change(shared, deltas=there)
    changed = tie.head if only_head else tie.embedding
    both = "both are written" if only_head and here else f"only {changed} changes"
    return _untie(tie, targets, base, both)


def _lost_end(
    tie: Tie, embedding: Change, head: Change, adapters: Sequence[tuple[Adapter, float]]
) -> list[str]:
    """PEFT 0.3 to 0.5 trained a copy of one end, the other one as well, and saved the copy."""
    owners = [
        {n for n, delta in change.deltas if delta.kind == "replace"} for change in (embedding, head)
    ]
    return [
        f"{adapter.given} was saved by PEFT 0.3 to 0.5 (its config has no rank_pattern), which "
        f"trained {lost} along with {saved}, which it was tied to, and did not save it: the merged "
        "model has the base's"
        for n, (adapter, _) in enumerate(adapters)
        if trains_originals(adapter.config) and sum(n in owner for owner in owners) == 1
        for saved, lost in [(tie.embedding, tie.head)[:: 1 if n in owners[0] else -1]]
    ]


def _for_both(deltas: Sequence[_Owned]) -> list[_Owned]:
    """What was done to the one weight that both ends are: by MLX, and by PEFT before 0.3."""
    return [item for item in deltas if item[1].param("both_ends", False)]


def _joined(own: Sequence[_Owned], others: Sequence[_Owned]) -> list[_Owned]:
    """What an end has, and what the other has for both, if it was not saved once for each."""
    saved_once = [item for item in others if not any(_alike([item], [mine]) for mine in own)]
    return sorted([*own, *saved_once], key=lambda item: item[0])


def _untie(tie: Tie, targets: Targets, base: Checkpoint, why: str) -> bool:
    """Say that the two are separate now, or refuse where that would change more than them."""
    targets.notes.append(
        f"{tie.embedding} and {tie.head} were tied; {why}, so each is a tensor of its own now and "
        "tie_word_embeddings is false"
    )
    architecture = (base.config.get("architectures") or ["?"])[0]
    if base.config.get("is_encoder_decoder") or architecture.endswith(_HEAD_INSIDE):
        targets.problems.append(
            Problem(
                f"only one of {tie.embedding} and its tied output would change, and {architecture} "
                "cannot have the two apart",
                "train the adapter with ensure_weight_tying=True, or without the embedding",
            )
        )
    return True


def _alike(one: Sequence[_Owned], other: Sequence[_Owned]) -> bool:
    """The same changes, if need be by tensors that were saved once for each side of the tie."""
    return len(one) == len(other) and all(
        n == m and (mine == yours or _twins(mine, yours))
        for (n, mine), (m, yours) in zip(one, other, strict=True)
    )


def _twins(mine: Delta, yours: Delta) -> bool:
    """Whether a delta of the embedding and one of the head are the same ΔW.

    `ensure_weight_tying` saves both, the head's factors being the embedding's transposed. The flag
    alone says nothing: PEFT sets it, and trains the two apart, on 16-bit bases and on GPT-2.
    """
    if (mine.kind, mine.weight, mine.scaling) != (yours.kind, yours.weight, yours.scaling):
        return False
    here, there = dict(mine.tensors), dict(yours.tensors)
    if mine.kind == "lora":
        return _transposed(here["A"], there["B"]) and _transposed(here["B"], there["A"])
    if mine.kind == "replace":
        return same_bytes(here["value"], there["value"])
    if mine.kind == "trainable_tokens":
        return mine.params == yours.params and same_bytes(here["rows"], there["rows"])
    return False


def _transposed(one: TensorRef, other: TensorRef) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape[::-1]:
        return False
    return bool((bits(one) == bits(other).T).all())
