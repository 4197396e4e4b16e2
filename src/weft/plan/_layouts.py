"""Layouts of other tools than Hugging Face's, as far as only the base can tell them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from weft.core.errors import Problem

if TYPE_CHECKING:
    from weft.core.specs import Adapter, AdapterEntry, Checkpoint

# Models whose norms are w + 1: mlx-lm adds the 1 when it loads their Hugging Face checkpoints.
_SHIFTED_NORMS = ("qwen3_next", "qwen3_5", "step3p5")


def fitted(base: Checkpoint, adapter: Adapter) -> tuple[Adapter, list[Problem]]:
    """The adapter as Hugging Face would have it for `base`, and what cannot be said so."""
    if adapter.format != "mlx-lm":
        return adapter, []
    read = [_unshifted(entry, base) for entry in adapter.entries]
    entries = tuple(entry for entry in read if not isinstance(entry, Problem))
    problems = [problem for problem in read if isinstance(problem, Problem)]
    return replace(adapter, entries=entries), problems


def _unshifted(entry: AdapterEntry, base: Checkpoint) -> AdapterEntry | Problem:
    model = str(base.config.get("model_type"))
    ref = entry.tensors[0][1]
    norm = entry.kind == "replace" and len(ref.shape) == 1 and "norm" in entry.module
    if not norm or not model.startswith(_SHIFTED_NORMS):
        return entry
    return Problem(
        f"{ref.name} in {ref.file} is a whole norm of {model}, and mlx-lm adds 1 to those when it "
        f"loads a base such as {base.given}",
        "this release of weft does not merge full training of such models: train with LoRA",
    )
