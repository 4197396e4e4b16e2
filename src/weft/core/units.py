"""Sizes, times and names as people read them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Sequence

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes meant by `text`: `5GB` is 5·10⁹ (as in transformers), `5GiB` is 5·2³⁰."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    factor = (_FACTORS | _BINARY).get(match[2]) if match else None
    if not match or factor is None:
        raise WeftError(f"cannot read {text!r} as a size", "write it like 5GB, 500MB or 2GiB")
    size = float(match[1]) * factor
    if not 1 <= size < 2**63:
        raise WeftError(f"a size of {size:g} bytes makes no sense", "write it like 5GB or 500MB")
    return int(size)


def show_size(size: float) -> str:
    """`2.47 GB`, with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{three(size)} {unit}"
        size /= 1000
    return f"{three(size)} TB"


def show_count(count: float) -> str:
    """`1.24 B`, with three digits, for parameters."""
    for unit in ("", " k", " M", " B"):
        if count < 999.5:
            return f"{count:.0f}" if not unit else f"{three(count)}{unit}"
        count /= 1000
    return f"{three(count)} T"


def show_time(seconds: float) -> str:
    """`0.82 s`, `3 min 20 s`."""
    if seconds < 99.95:
        return f"{three(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def show_share(share: float | None) -> str:
    """A share in percent; never rounds 99.96 up to a hundred, nor 0.04 down to none."""
    if share is None:
        return "—"
    percent = share * 100
    if 99.9 < percent < 100:
        return f"{math.floor(percent * 1000) / 1000:.3f} %"
    if percent <= 0 or 0.1 <= percent < 999.95:
        return f"{percent:.1f} %"
    if 0.001 <= percent < 0.1:
        return f"{percent:.3f} %"
    return f"{percent:.0f} %" if 999.95 <= percent < 1e6 else f"{percent:.1e} %"


def show_survival(survival: float | None) -> str:
    """What is left of an update, in percent: below none there is nothing to tell apart."""
    return show_share(None if survival is None else max(survival, 0.0))


def some(names: Sequence[str], noun: str, shown: int = 3) -> str:
    """`5 modules (a, b, c …)`, or `module a` where it is the only one."""
    if len(names) == 1:
        return f"{noun} {names[0]}"
    more = " …" if len(names) > shown else ""
    return f"{len(names)} {noun}s ({', '.join(names[:shown])}{more})"


def clean(text: str) -> str:
    """`text` on one line, without what a terminal would obey: for names that come out of files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def three(value: float) -> str:
    """`value` to three significant digits, without an exponent."""
    magnitude = abs(value)
    if magnitude >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if magnitude >= 9.995 else f"{value:.2f}"
