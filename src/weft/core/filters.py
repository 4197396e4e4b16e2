"""`self_attn, *.mlp.*, /norm$/`: which tensors of a model are meant."""

from __future__ import annotations

import re
from fnmatch import translate
from typing import TYPE_CHECKING

from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Callable

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


def _expression(part: str) -> str:
    if len(part) > 1 and part[0] == part[-1] == "/":
        return part[1:-1]
    return rf"\A{translate(part)}" if set("*?[") & set(part) else re.escape(part)
