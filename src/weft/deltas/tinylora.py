"""TinyLoRA (arXiv:2602.04118): W′ = W + B @ R @ A, with R = Σᵢ vᵢ Pᵢ.

`A` (r, in), `B` (out, r) and `P` (u, r, r) are fixed; modules that follow each other in the model's
code share one `v` (u), more of them the larger `tying` is. The file has the vectors in that order,
`v0`, `v1`, …, and does not tell where in it a module is. But P was drawn with `seed` + that place:
it is the one of all `modules` places whose P it is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from weft.core.errors import FormatError
from weft.core.lazy import torch
from weft.deltas import _low_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

ADDITIVE = True
TRANSPOSES = True
# P may have been rounded to bfloat16.
_ROUNDED = 2**-8


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    return _low_rank.orientations(shapes, params, weight)


def prepare(delta: Delta, source: Source, blocks: Blocks) -> _low_rank.Factors:
    A, B, P = (source.whole(role) for role in "ABP")
    groups = [role for role, _ in delta.tensors if role.startswith("v")]
    role = groups[0]
    if len(groups) > 1:
        modules, tying = int(delta.param("modules", 1)), float(delta.param("tying", 0))  # type: ignore[arg-type]
        role = f"v{group(_place(P, delta), modules, tying)}"
    R = torch.einsum("i,ijk->jk", source.whole(role), P)
    left, right = B @ R, A
    if delta.param("transposed", False):
        left, right = right.T, left.T
    return _low_rank.Factors(left, right, 1.0)


def square(state: _low_rank.Factors) -> float:
    return state.square()


def block(state: _low_rank.Factors, weight: Tensor, start: int, out: Tensor) -> None:
    state.product(start, out)


def group(place: int, modules: int, tying: float) -> int:
    """Which vector the module at that place has."""
    groups = max(1, round(modules * (1 - tying)))
    return min(place // max(1, modules // groups), groups - 1)


def _place(P: Tensor, delta: Delta) -> int:
    """Where in the model's order the module is that drew P."""
    seed, modules = int(delta.param("seed", 0)), int(delta.param("modules", 1))  # type: ignore[arg-type]
    drawn = _drawn(tuple(P.shape), seed, modules).to(P)
    close = (drawn - P).abs() <= _ROUNDED * drawn.abs()
    (places,) = close.flatten(1).all(1).nonzero(as_tuple=True)
    if len(places) == 1:
        return int(places[0])
    ref = dict(delta.tensors)["P"]
    raise FormatError(
        f"{ref.name} in {ref.file} is not what projection_seed = {seed} gives for any one of "
        f"{modules} modules, so which tinylora_v belongs to it is not known",
        "the file lost modules, or projection_seed in adapter_config.json is not the one that it "
        "was trained with",
    )


@lru_cache(maxsize=8)
def _drawn(shape: tuple[int, ...], seed: int, modules: int) -> Tensor:
    """(modules, u, r, r): the P of each place."""
    return torch.stack(
        [
            torch.normal(
                0.0, shape[1] ** -0.5, shape, generator=torch.Generator().manual_seed(seed + n)
            )
            for n in range(modules)
        ]
    )
