"""Which tensor NaN or infinity comes from: looked for only once there is some in the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.blocks import BLOCK, rows_and_columns
from weft.core.errors import NumericsError
from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weft.core.specs import TensorRef
    from weft.execute._blocks import Files, Workspace


def culprit(refs: Iterable[TensorRef], files: Files, workspace: Workspace) -> NumericsError | None:
    """What is wrong with the first of `refs` that holds NaN or infinity, if one does."""
    for ref in dict.fromkeys(refs):
        if getattr(torch, ref.dtype).is_floating_point and not _sound(ref, files, workspace):
            what = f"{ref.name} in {ref.file} holds NaN or infinity"
            return NumericsError(what, "check that file, or leave that model out")
    return None


def _sound(ref: TensorRef, files: Files, workspace: Workspace) -> bool:
    rows, columns = rows_and_columns(ref.shape)
    step = max(1, BLOCK[workspace.kind] // max(columns, 1))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        out = workspace.compute("searched", stop - start, columns, torch.float32)
        workspace.load(files, ref, start, stop, out)
        if not out.isfinite().all():
            return False
    return True
