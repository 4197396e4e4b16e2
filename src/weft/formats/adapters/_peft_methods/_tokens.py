"""Trained rows of an embedding: an adapter of their own, or a part of a LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Problem
from weft.core.specs import AdapterEntry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.specs import TensorRef


def token_rows(
    module: str, rows: TensorRef, config: Mapping[str, Any], field: str
) -> AdapterEntry | Problem:
    """The rows of `module`; `field` of the config says which they are: a list, or one by module."""
    indices = config.get(field)
    if isinstance(indices, dict):
        found = [v for k, v in indices.items() if module == k or module.endswith("." + k)]
        # The head that is tied to the one embedding named has the same rows trained.
        found = found or (list(indices.values()) if len(indices) == 1 else [])
        indices = found[0] if len(found) == 1 else None
    if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
        return Problem(
            f"module {module!r} in {rows.file} has trained token rows, and {field} in "
            "adapter_config.json does not say which"
        )
    # PEFT keeps the rows in the order of the list, and drops repeated indices when it wraps.
    if len(set(indices)) != len(indices) or len(rows.shape) != 2 or rows.shape[0] != len(indices):
        return Problem(
            f"module {module!r} in {rows.file} has token rows of shape {list(rows.shape)}, and "
            f"{field} in adapter_config.json names {len(set(indices))} tokens"
        )
    return AdapterEntry(
        module,
        "weight",
        "trainable_tokens",
        (("rows", rows),),
        params=(("indices", tuple(indices)),),
    )
