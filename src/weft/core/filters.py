"""`self_attn, *.mlp.*, /norm$/`: which tensors of a model are meant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import translate
from typing import TYPE_CHECKING

from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_PART = re.compile(r"\s*(/(?:[^/\\]|\\.)*/|[^,]*?)\s*(?:,|$)")


def names_filter(text: str) -> Callable[[str], bool]:
    """What tells the names that `text` means: a comma list, of which one has to match.

    A plain word is a part of the name; one with `*`, `?` or `[` is a glob of the whole name; one
    between slashes is a regular expression that is found in it.

    Raises:
        WeftError: It is empty, or a regular expression is none.
    """
    patterns = []
    for part in filter(None, _PART.findall(text)):
        try:
            patterns.append(re.compile(_expression(part)))
        except re.error as error:
            raise WeftError(
                f"{part} is no regular expression: {error}", "write a part of a name, or a glob"
            ) from None
    if not patterns:
        raise WeftError(
            f"the filter {text!r} names nothing", "write it like self_attn,*.mlp.*,/norm$/"
        )
    return lambda name: any(pattern.search(name) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Filter:
    """One entry of a comma list, where it matters which one means a name."""

    text: str

    def matches(self, name: str) -> bool:
        """Whether it means `name`."""
        return re.search(_expression(self.text), name) is not None


def parse(text: str) -> tuple[Filter, ...]:
    """The entries of a comma list; none for an empty text.

    Raises:
        WeftError: A regular expression is none.
    """
    if not text.strip():
        return ()
    names_filter(text)
    return tuple(Filter(part) for part in _PART.findall(text) if part)


def any_of(filters: Iterable[Filter], name: str) -> Filter | None:
    """The first filter that means `name`."""
    return next((each for each in filters if each.matches(name)), None)


def _expression(part: str) -> str:
    if len(part) > 1 and part[0] == part[-1] == "/":
        return part[1:-1]
    return rf"\A{translate(part)}" if set("*?[") & set(part) else re.escape(part)
