"""Adapter formats: one file each, with `detect(path)` and `read(path, given)`.

`open_adapter` asks every format; two that both claim a path is an error, not "first match wins".
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol, cast

from weft.core.errors import FormatError, NotFound, WeftError

if TYPE_CHECKING:
    from pathlib import Path

    from weft.core.specs import Adapter
from weft.formats.adapters._described import described
from weft.formats.adapters._elsewhere import adapters_inside, not_here
from weft.formats.checkpoint import LOST_CONFIG, has_weights


class AdapterFormat(Protocol):
    """What a file in this folder defines."""

    __name__: str

    def detect(self, path: Path) -> bool:
        """Whether `path` is an adapter in this format, by names and content; reads no weight."""

    def read(self, path: Path, given: str) -> Adapter:
        """Read headers and config; every tensor of the file is in one entry, or the call raises."""


def formats() -> list[AdapterFormat]:
    """Every format in this folder."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return [cast("AdapterFormat", importlib.import_module(f"{__name__}.{name}")) for name in names]


def open_adapter(path: Path, given: str) -> Adapter:
    """Read the adapter at `path`.

    Raises:
        NotFound: No format knows it.
        FormatError: Several formats claim it, or the one that does finds it malformed.
    """
    claims = [form for form in formats() if form.detect(path)]
    if len(claims) > 1:
        names = " and ".join(form.__name__.rpartition(".")[2] for form in claims)
        raise FormatError(f"{path} could be an adapter in the formats {names}")
    if not claims:
        if has_weights(path) and not adapters_inside(path):
            raise NotFound(
                f"{path} is a base model, not an adapter",
                "weft merge BASE ADAPTER, or weft doctor ADAPTER --base BASE",
            )
        if path.is_file():
            raise NotFound(
                f"no adapter in {path}: no adapter_config.json beside it says how to scale one",
                f"{LOST_CONFIG}; or give the folder that has both",
            )
        raise not_here(path)
    return claims[0].read(path, given)


def describe_adapter(path: Path, given: str) -> Adapter:
    """As `open_adapter`; one that is none to merge is described all the same, and why.

    Raises:
        WeftError: No adapter, or not even its config and header can be read.
    """
    try:
        return open_adapter(path, given)
    except WeftError as error:
        if found := described(path, given, error):
            return found
        raise


def is_adapter(path: Path) -> bool:
    """Whether some format knows `path`."""
    return any(form.detect(path) for form in formats())
