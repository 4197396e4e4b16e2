"""PEANuT (arXiv:2410.01870): W′ = W + scaling · B @ f(A @ W), a small network f at every input.

`A` (r, out), `B` (out, r), and `encoder0`, `decoder0`, … (r, r). Each column goes through the
activation, then through the encoders and, in the order of their numbers, the decoders, each with
the activation; after a decoder what the last encoder without one was given is added.

A @ W takes every row of W: a pass over it comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch.nn import functional

from weft.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from weft.core.specs import Delta, Param, Shape
    from weft.deltas import Blocks, Source

    Function = Callable[[Tensor], Tensor]

ADDITIVE = True

_GELU_TANH = partial(functional.gelu, approximate="tanh")
# By the names that transformers has for them.
ACTIVATIONS: dict[str, Function] = {
    "relu": torch.relu,
    "relu2": lambda x: x.relu().square(),
    "relu6": functional.relu6,
    "leaky_relu": functional.leaky_relu,
    "gelu": functional.gelu,
    "gelu_python": functional.gelu,
    "gelu_10": lambda x: functional.gelu(x).clamp(-10, 10),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate"), _GELU_TANH),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh"), _GELU_TANH),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "swish": functional.silu,
    "hardswish": functional.hardswish,
    "mish": functional.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": torch.clone,
}


@dataclass(frozen=True, slots=True)
class State:
    """B (out, r), and scaling · f(A @ W), (r, in)."""

    B: Tensor
    hidden: Tensor


def orientations(
    shapes: Mapping[str, Shape], params: Mapping[str, Param], weight: Shape
) -> tuple[bool, ...]:
    return (False,) if len(weight) == 2 and weight[0] == shapes["B"][0] else ()


def prepare(delta: Delta, source: Source, blocks: Blocks) -> State:
    A, B = source.whole("A"), source.whole("B")
    seen = torch.zeros(len(A), source.shape[1], dtype=torch.float64, device=A.device)
    for start, weight in blocks():
        seen += A[:, start : start + weight.shape[0]] @ weight
    activation = ACTIVATIONS[str(delta.param("activation", "relu"))]
    hidden = activation(seen.to(A.dtype))
    depth = sum(role.startswith("encoder") for role, _ in delta.tensors)
    given = []
    for n in range(depth):
        given.append(hidden)
        hidden = activation(source.whole(f"encoder{n}") @ hidden)
    for n in range(depth):
        hidden = activation(source.whole(f"decoder{n}") @ hidden) + given.pop()
    return State(B, hidden * delta.scaling)


def block(state: State, weight: Tensor, start: int, out: Tensor) -> None:
    torch.mm(state.B[start : start + out.shape[0]], state.hidden, out=out)
