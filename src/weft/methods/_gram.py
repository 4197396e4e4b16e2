"""Inner products of whole tensors: many methods are a weighted sum whose weights they give.

One pass over the blocks gives the Gram matrix Gᵢⱼ = ⟨xᵢ, xⱼ⟩ in float64; norms, angles and
iterations on the sphere are then arithmetic on a few numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weft import native
from weft.core.sums import dot

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from weft.methods import Block, Blocks

    Matrix = np.ndarray[Any, np.dtype[np.float64]]


def gram(blocks: Blocks, *, base: bool = False) -> Matrix:
    """⟨xᵢ, xⱼ⟩ for all inputs (n, n); with `base`, that is number 0 before them."""

    def products(block: Block) -> list[list[float]]:
        operands = block.operands()
        first = block.base_operand() if base else None
        if operands is not None and len(operands) + (first is not None) <= native.MOST:
            return native.gram([*([first] if first is not None else []), *operands])
        tensors = [*([block.base] if base and block.base is not None else []), *block.inputs]
        flat = [each.reshape(-1) for each in tensors]
        return [[dot(one, other) for other in flat[: n + 1]] for n, one in enumerate(flat)]

    import numpy as np

    parts = blocks.map(products)
    count = len(parts[0])
    total = np.zeros((count, count))
    for part in parts:
        for n, row in enumerate(part):
            total[n, : n + 1] += row
    return np.tril(total) + np.tril(total, -1).T


def norm(products: Matrix, weights: Sequence[float] | Matrix) -> float:
    """‖Σ wᵢ xᵢ‖ of vectors with these inner products."""
    import numpy as np

    w = np.asarray(weights)
    if not np.isfinite(products).all():
        return math.nan
    return float(np.sqrt(max(w @ products @ w, 0.0)))
