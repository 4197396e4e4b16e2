"""Random numbers by place: what an element draws depends on nothing but the seed and its index.

Philox (Salmon et al., 2011) makes the n-th number from n alone, and NumPy keeps its raw streams as
they are; so masks are the same for any blocks and threads, and after a resume.
"""

from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING, Any

from weft import native

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_WORDS = 4  # of 64 bits, that Philox makes of one counter


def uniform32(key: str, start: int, count: int) -> Array:
    """Whole numbers below 2³² (uint32) for the elements `start` to `start + count`."""
    return _raw(key, start, count, 2).view("<u4")[start % 2 :][:count]


def bernoulli(key: str, probability: float, start: int, count: int) -> Array:
    """True with `probability`, for the elements `start` to `start + count`.

    16 bits decide for nearly all; where they leave it open, 64 more do.
    """
    import numpy as np

    scaled = probability * 2**16
    whole = int(scaled)
    bits = _raw(key, start, count, 4).view("<u2")[start % 4 :][:count]
    drawn: Array = bits < whole
    for at in np.flatnonzero(bits == whole) if scaled > whole else ():
        more = _raw(f"{key} more", start + int(at), 1, 1)[0]
        drawn[at] = float(more) < (scaled - whole) * 2.0**64
    return drawn


def _raw(key: str, start: int, count: int, parts: int) -> Array:
    """The 64-bit words that hold the elements `start` to `start + count`, `parts` to a word."""
    import numpy as np

    first, last = start // parts, -(-(start + count) // parts)
    counter, skip = divmod(first, _WORDS)
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    needed = skip + last - first
    if native.library() is not None and sys.byteorder == "little":
        words: Array = np.empty(-(-needed // _WORDS) * _WORDS, np.uint64)
        native.philox(seed, counter, words)
        return words[skip:needed]
    words = np.random.Philox(key=seed, counter=counter).random_raw(needed)
    return words[skip:].astype("<u8", copy=False)
