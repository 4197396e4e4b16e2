r"""Filters of tensor names: `self_attn, mlp, lm_head`, `*norm*`, `/layers\.[0-3]\./`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Filter:
    """One entry of a comma list.

    Attributes:
        text: As it was written: parts of a dotted name (`mlp`, `layers.0`), a glob of a whole name
            or of its end (`*norm*`, `q_proj.*`), or a regular expression between slashes, which is
            searched for.
    """

    text: str

    def matches(self, name: str) -> bool:
        """Whether it means the tensor or module `name`."""
        if self.text.startswith("/"):
            return re.search(self.text[1:-1], name) is not None
        if any(letter in self.text for letter in "*?["):
            parts = name.split(".")
            ends = (".".join(parts[n:]) for n in range(len(parts)))
            return any(fnmatchcase(end, self.text) for end in ends)
        return f".{self.text}." in f".{name}."


def parse(text: str) -> tuple[Filter, ...]:
    """The entries of a comma list; commas inside of a regular expression belong to it.

    Raises:
        WeftError: A regular expression that is none.
    """
    entries = re.findall(r"\s*(/(?:[^/\\]|\\.)*/|[^,]+)\s*(?:,|$)", text)
    found = tuple(Filter(entry.strip()) for entry in entries if entry.strip())
    for each in found:
        if not each.text.startswith("/"):
            continue
        if len(each.text) < 3 or not each.text.endswith("/"):
            raise WeftError(
                f"the filter {each.text!r} begins like a regular expression and does not end so",
                "write it between slashes: /layers\\.[0-3]\\./",
            )
        try:
            re.compile(each.text[1:-1])
        except re.error as error:
            raise WeftError(
                f"the filter {each.text!r} is no regular expression: {error}",
                "parts of names need no slashes: self_attn, mlp",
            ) from None
    return found


def any_of(filters: Iterable[Filter], name: str) -> Filter | None:
    """The first filter that means `name`."""
    return next((each for each in filters if each.matches(name)), None)
