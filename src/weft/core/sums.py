"""Sums over many elements, as exact as float64 and as fast as float32."""

from __future__ import annotations

from typing import Any

RUN = 2**12  # elements that BLAS adds in their own dtype, and without threads of its own


def dot(one: Any, other: Any) -> float:
    """Σ xᵢ yᵢ of contiguous torch tensors of one shape and dtype; infinite where that overflows."""
    if one.device.type != "cpu":
        return float((one * other).double().sum())
    return dot_of_arrays(one.numpy().reshape(-1), other.numpy().reshape(-1))


def dot_of_arrays(x: Any, y: Any) -> float:
    """The same of flat arrays of NumPy: in runs of `RUN`, whose sums are added in float64."""
    import numpy as np

    even = len(x) // RUN * RUN
    with np.errstate(over="ignore", invalid="ignore"):  # the sum shows it
        runs = np.matmul(x[:even].reshape(-1, 1, RUN), y[:even].reshape(-1, RUN, 1))
        return float(runs.sum(dtype=np.float64)) + float(np.dot(x[even:], y[even:]))
