"""PEFT's methods other than LoRA: how each writes its tensors, one file per method.

A file says which keys and config fields are the method's, and turns the tensors of one module into
entries; what an entry does to the weight is said in `weft.deltas`.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from weft.core.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.specs import AdapterEntry, TensorRef


@dataclass(frozen=True, slots=True)
class Module:
    """What the file holds for one module.

    Attributes:
        name: Dotted path in the model that the adapter was trained on.
        tensors: Role -> byte range.
        shared: Role -> byte range, of what all modules use.
        config: `adapter_config.json`.
    """

    name: str
    tensors: Mapping[str, TensorRef]
    shared: Mapping[str, TensorRef]
    config: Mapping[str, Any]

    @property
    def file(self) -> str:
        return next(iter(self.tensors.values())).file


def lacks(module: Module, **roles: str) -> Problem | None:
    """Say which of the tensors (name in the file = role) the module does not have, if any."""
    missing = [name for name, role in roles.items() if role not in module.tensors]
    if not missing:
        return None
    there = ", ".join(ref.name for ref in module.tensors.values())
    return Problem(
        f"module {module.name!r} in {module.file} has {there} and lacks {' and '.join(missing)}",
        "the file lost tensors: save or download the adapter again",
    )


class PeftMethod(Protocol):
    """What a file in this folder defines."""

    # As adapter_config.json spells it.
    PEFT_TYPE: str
    # Ending of a key -> role of the tensor. Longer endings are tried first.
    SUFFIXES: Mapping[str, str]
    # Fields of the config that only this method has.
    FIELDS: frozenset[str]

    # A file may also define
    # - `SHARED: Mapping[str, str]`: whole keys of tensors that all modules use -> role;
    # - `FORMS: Mapping[str, Form]`: what a field must be (as in `_peft_config`), where it is used;
    # - `MAY_BE_EMPTY: tuple[str, ...]`: endings of tensors that may have no elements;
    # - `check(config) -> Problem | None`: a reason that no adapter with this config can be merged.

    def read(self, module: Module) -> list[AdapterEntry] | Problem:
        """The entries of one module; together they use every tensor of it."""


@cache
def methods() -> dict[str, PeftMethod]:
    """`peft_type` -> method."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    found = [cast("PeftMethod", importlib.import_module(f"{__name__}.{n}")) for n in sorted(names)]
    return {method.PEFT_TYPE: method for method in found}
