"""How much an iteration would still find."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def to_come(captured: Sequence[float], least: float = 0.1) -> float:
    """What further blocks add to `captured`, as a geometric series; infinite where none shows yet.

    Args:
        captured: The sum of what was found after each block.
        least: The ratio of the series is not believed to be less.
    """
    if len(captured) < 3:
        return math.inf
    before, now = captured[-2] - captured[-3], captured[-1] - captured[-2]
    ratio = min(max(now / max(before, 1e-300), least), 0.7)
    return now * ratio / (1 - ratio)
