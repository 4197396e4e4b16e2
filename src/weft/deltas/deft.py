"""DEFT (arXiv:2509.22793): what W does in a small subspace of its outputs gives way to another.

W′ = W + Q @ (scaling · R − Pᵀ @ W), with `P` (out, r), `R` (r, in). Q is the one that `P` has in
its QR decomposition, and then also stands in for P (`method` "qr"), or Q is `P`, and what stands in
for P is its positive part ("relu"). Without `R`, the subspace is only removed (PaRa,
arXiv:2406.05641).

Pᵀ @ W takes every row of W: a pass over it comes first. Where W is stored (in, out) a row of it
needs no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
TRANSPOSES = True


@dataclass(frozen=True, slots=True)
class State:
    """What `block` multiplies.

    Attributes:
        Q: (out, r).
        P: (out, r), if it is still to be multiplied with W, which is stored (in, out).
        change: scaling · R − Pᵀ @ W, (r, in); or scaling · R alone.
    """

    Q: Tensor
    P: Tensor | None
    change: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    outputs = shapes["P"][0]
    inputs = shapes["R"][1] if "R" in shapes else None
    return tuple(
        turned
        for turned, shape in ((False, weight), (True, weight[::-1]))
        if len(shape) == 2 and shape[0] == outputs and shape[1] == (inputs or shape[1])
    )


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    Q, P = _project(source.whole("P"), str(delta.param("method", "relu")))
    turned = bool(delta.param("transposed", False))
    inputs = source.shape[0 if turned else 1]
    change = Q.new_zeros(Q.shape[1], inputs)
    if any(role == "R" for role, _ in delta.tensors):
        change += source.whole("R") * delta.scaling
    if turned:
        return State(Q, P, change)
    inside = torch.zeros(change.shape, dtype=torch.float64, device=Q.device)
    for start, weight in blocks():
        inside += P[start : start + weight.shape[0]].T @ weight
    return State(Q, None, change - inside.to(change.dtype))


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    stop = start + out.shape[0]
    if state.P is None:
        torch.mm(state.Q[start:stop], state.change, out=out)
    else:
        torch.mm(state.change[:, start:stop].T - weight @ state.P, state.Q.T, out=out)


def _project(P: Tensor, method: str) -> tuple[Tensor, Tensor]:
    if method == "relu":
        return P, P.relu()
    Q, _ = torch.linalg.qr(P)
    return Q, Q
