"""What of an adapter's entry only the base can tell, where another tool has layouts of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.errors import Problem

if TYPE_CHECKING:
    from weft.core.specs import AdapterEntry, Checkpoint

# Models whose norms are w + 1, which mlx-lm adds when it loads them, and not where they are 1-based
# on disk already.
_SHIFTED_NORMS = ("qwen3_next", "qwen3_5", "step3p5")


def fitted(entry: AdapterEntry, format: str, base: Checkpoint) -> AdapterEntry | Problem:
    """The entry as Hugging Face would have it for `base`, or why that cannot be said."""
    if format == "mlx-lm" and entry.kind == "replace":
        return _unshifted(entry, base)
    return entry


def _unshifted(entry: AdapterEntry, base: Checkpoint) -> AdapterEntry | Problem:
    model = str(base.config.get("model_type"))
    ref = entry.tensors[0][1]
    if len(ref.shape) != 1 or "norm" not in entry.module or not model.startswith(_SHIFTED_NORMS):
        return entry
    return Problem(
        f"{ref.name} in {ref.file} is a whole norm of {model}, and mlx-lm adds 1 to those when it "
        f"loads a base such as {base.given}",
        "this release of weft does not merge full training of such models: train with LoRA",
    )
