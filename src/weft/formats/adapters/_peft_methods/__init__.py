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
    from collections.abc import Iterable, Mapping

    from weft.core.specs import AdapterEntry, TensorRef


@dataclass(frozen=True, slots=True)
class Module:
    """What the file holds for one module.

    Attributes:
        name: Dotted path in the model that the adapter was trained on.
        tensors: Role -> byte range.
        shared: Role -> byte range, of what all modules use.
        config: `adapter_config.json`.
        endings: Role -> ending of its key.
        total: How many modules there are in the file.
    """

    name: str
    tensors: Mapping[str, TensorRef]
    shared: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    endings: Mapping[str, str]
    total: int

    @property
    def file(self) -> str:
        return next(iter(self.tensors.values())).file

    def sizes(self, **patterns: str) -> dict[str, int] | Problem:
        """What the names in the patterns stand for, as in `A="r in", B="out r"`.

        `_` is any size, a number is itself, and a last `...` stands for any further axes. The
        tensors must all be there, and agree.
        """
        missing = [self.endings.get(role, role) for role in patterns if role not in self.tensors]
        if missing:
            return Problem(
                f"module {self.name!r} in {self.file} has {self._shown()} and lacks "
                f"{', '.join(ending.lstrip('.') for ending in missing)}",
                "the file lost tensors: save or download the adapter again",
            )
        found: dict[str, int] = {}
        for role, pattern in patterns.items():
            if not _unify(self.tensors[role].shape, pattern.split(), found):
                return self.misfit()
        return found

    def only(self, roles: Iterable[str]) -> tuple[tuple[str, TensorRef], ...]:
        """The tensors of `roles`, for an entry; what no entry uses is an error."""
        return tuple((role, self.tensors[role]) for role in roles)

    def misfit(self, why: str = "do not belong together") -> Problem:
        return Problem(
            f"module {self.name!r} in {self.file}: {self._shown()} {why}",
            "the file was cut, or saved by one process of several without gathering: save it again",
        )

    def _shown(self) -> str:
        there = self.tensors.items()
        return ", ".join(
            f"{self.endings.get(role, role).lstrip('.')} {list(ref.shape)}" for role, ref in there
        )


def _unify(shape: tuple[int, ...], pattern: list[str], found: dict[str, int]) -> bool:
    """Whether `shape` is what the pattern says; new names go into `found`."""
    if pattern[-1] == "...":
        pattern = pattern[:-1]
        shape = shape[: len(pattern)]
    return len(shape) == len(pattern) and all(
        name == "_" or size == (int(name) if name.isdigit() else found.setdefault(name, size))
        for name, size in zip(pattern, shape, strict=True)
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
    # - `SHARED: Mapping[str, str]`: whole keys of tensors that all modules use -> role; what
    #   follows a key that ends in a dot is added to the role;
    # - `FORMS: Mapping[str, Form]`: what a field of the config must be, where `read` uses it; one
    #   that is missing counts as None;
    # - `MAY_BE_EMPTY = True`: that a tensor without elements is no sign of a broken save;
    # - `check(config) -> Problem | None`: a reason that no adapter with this config can be merged;
    # - `notes(config) -> list[str]`: what a reader of the file should know and no tensor shows.

    def read(self, module: Module) -> list[AdapterEntry] | Problem:
        """The entries of one module; together they use every tensor of it."""


@cache
def methods() -> dict[str, PeftMethod]:
    """`peft_type` -> method."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    found = [cast("PeftMethod", importlib.import_module(f"{__name__}.{n}")) for n in sorted(names)]
    return {method.PEFT_TYPE: method for method in found}
