"""Sums over many elements, as exact as float64 and as fast as float32."""

from __future__ import annotations

from typing import Any

RUN = 2**12  # elements that BLAS adds in their own dtype; the sums of runs are added in float64


def dot(one: Any, other: Any) -> float:
    """Σ xᵢ yᵢ of contiguous torch tensors of one shape and dtype; infinite where that overflows."""
    import numpy as np

    x, y = one.reshape(-1), other.reshape(-1)
    even = len(x) // RUN * RUN
    a, b = x[:even].view(-1, RUN), y[:even].view(-1, RUN)
    if one.device.type == "cpu":
        runs = np.matmul(a.numpy()[:, None, :], b.numpy()[:, :, None])
        total = float(runs.sum(dtype=np.float64))
    else:
        total = float((a * b).sum(1).double().sum())
    return total + float((x[even:] * y[even:]).double().sum())
