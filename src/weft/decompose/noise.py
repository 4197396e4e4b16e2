"""What rounding to the storage dtype leaves in ΔW, and which singular values stand above it.

A weight w on the grid of its dtype becomes round(w + δ), and what is seen of δ is D = u round(δ/u)
with u = ulp(w). Split D = c δ + η into what goes with δ and the rest (Bussgang, 1952). For δ of
many ulps, c = 1 and η is uniform within an ulp, of variance u²/12. An update below half an ulp
vanishes, but for the weights whose ulp is small: η is no larger than D then, and u²/12 says far too
much. For δ ~ N(0, τ²), with φ and Q the normal density and tail and aⱼ = (j + ½) u/τ,

    E[D²] = Σⱼ (2j + 1) 2 u² Q(aⱼ),   E[D δ] = Σⱼ 2 u τ φ(aⱼ),   c = E[D δ]/τ²,

so that the mean of D², which is known, says τ, and Var η = E[D²] − c² τ².
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Singular values of noise of a finite matrix may stand this far above the edge of an infinite one.
_ABOVE_EDGE = 1.02
# What is left of ΔW is not the noise predicted, if its deviation is off by more than this.
_FITS = 0.1
# Of the variance of uniform noise: with less, large ulps hide what they round; most of all.
_UNIFORM, _HIDDEN = 0.8, 0.1
# Of ‖ΔW‖²: less is not told from the rounding of the products that gave the singular values.
_SEEN = 1e-5
_MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23}
_LOWEST = {"bfloat16": -126, "float16": -14, "float32": -126}
_MANTISSA |= {"float8_e4m3fn": 3, "float8_e5m2": 2}
_LOWEST |= {"float8_e4m3fn": -6, "float8_e5m2": -14}


@dataclass(frozen=True, slots=True)
class Ulps:
    """The units in the last place of some weights: what sizes, and which share has each."""

    sizes: tuple[float, ...]
    shares: tuple[float, ...]

    @property
    def mean_square(self) -> float:
        """The mean of ulp²."""
        return math.fsum(s * u * u for u, s in zip(self.sizes, self.shares, strict=True))


def ulps(block: Tensor, dtype: str) -> Ulps:
    """Of weights stored in `dtype`: 2^(⌊log₂|w|⌋ − mantissa bits).

    Args:
        block: Weights of any shape, as they are stored or widened.
        dtype: `bfloat16`, `float16` or `float32`. Below its normal numbers the ulp is constant.
    """
    import torch

    powers = _powers(block.reshape(-1), dtype)
    counts = torch.bincount(powers, minlength=256)
    found = [(n - 127 - _MANTISSA[dtype], c) for n, c in enumerate(counts.tolist()) if c]
    number = powers.numel()
    return Ulps(tuple(2.0**power for power, _ in found), tuple(c / number for _, c in found))


def _powers(block: Tensor, dtype: str) -> Tensor:
    """⌊log₂|w|⌋ + 127, which is the exponent of a float32; narrower types are a part of float32."""
    import torch

    powers = (block.float().contiguous().view(torch.int32) >> 23) & 0xFF
    return powers.clamp_min_(_LOWEST[dtype] + 127)


def ulp_of(block: Tensor, dtype: str) -> Tensor:
    """That of each weight, in float32 (2⁻¹²⁶ at least); see `ulps`."""
    import torch

    powers = (_powers(block, dtype) - _MANTISSA[dtype]).clamp_min_(1)
    return (powers << 23).view(torch.float32)


def uneven(block: Tensor, dtype: str) -> Tensor:
    """ulp² of each weight, in float32, in a unit of its own: how noise is spread, not how large.

    Weights of 2⁻⁷⁰ to 2⁵⁶ are told apart: float32 has no more squares.
    """
    import torch

    powers = (2 * (_powers(block, dtype) - _MIDDLE) + 127).clamp_(1, 254)
    return (powers << 23).view(torch.float32)


_MIDDLE = 120  # the exponent of 2⁻⁷, about which weights are


def scaled_ulps(block: Tensor, scale: Tensor, dtype: str) -> Ulps:
    """Of weights that are numbers of `dtype` times scales: scale · ulp(w / scale).

    Sizes are rounded to a sixteenth of a power of two, half of them up: scales are many.

    Args:
        block: The weights, of any shape, widened.
        scale: Of each of them, in the same shape; a zero belongs to weights that are zero.
        dtype: `float8_e4m3fn` or `float8_e5m2`.
    """
    import numpy as np
    import torch

    numbers = (block / scale.abs().clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num()
    numbers = numbers.to(getattr(torch, dtype)).float()  # w / scale is off by a float32's rounding
    powers = torch.frexp(numbers).exponent - 1
    powers = torch.where(numbers == 0, _LOWEST[dtype], powers).clamp_min(_LOWEST[dtype])
    logs = powers - _MANTISSA[dtype] + scale.abs().double().log2()
    steps, counts = np.unique((logs[logs.isfinite()] * 16).round().numpy(), return_counts=True)
    number = max(block.numel(), 1)
    return Ulps(
        tuple(2.0 ** (step / 16) for step in steps.tolist()),
        tuple(count / number for count in counts.tolist()),
    )


@dataclass(frozen=True, slots=True)
class Noise:
    """What rounding adds to each element of ΔW.

    Attributes:
        uniform: mean(ulp²) / 12, of an update of many ulps.
        variance: Of this update.
        update: τ², of the update itself; 0 where that is not told.
        rank: Of the update, where what is seen is explained by one (see `explained`).
    """

    uniform: float = 0.0
    variance: float = 0.0
    update: float = 0.0
    rank: int | None = None

    @property
    def is_uniform(self) -> bool:
        """The update is of so many ulps that what is rounded off hardly depends on it."""
        return self.variance > _UNIFORM * self.uniform > 0

    @property
    def is_hidden(self) -> bool:
        """It is of so small a part of an ulp that most weights did not change."""
        return self.variance < _HIDDEN * self.uniform

    def edge(self, shape: tuple[int, int]) -> float:
        """σ (√m + √n), where the singular values of such noise end (Bai & Yin, 1993)."""
        return _edge(self.variance, shape)


def _edge(variance: float, shape: tuple[int, int]) -> float:
    return math.sqrt(variance) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def rounding(found: Ulps, mean_square: float, *, on_grid: bool) -> Noise:
    """The noise in a difference.

    Args:
        found: Of what the tuned weights were rounded to.
        mean_square: ‖ΔW‖² / (m n).
        on_grid: The base's weights are numbers of the same dtype. Those that are not are rounded
            whatever the update is, and the error is uniform.
    """
    uniform = found.mean_square / 12
    if not on_grid or mean_square <= 0 or not uniform:
        return Noise(uniform, uniform)
    low, high = 0.0, math.sqrt(mean_square)
    while _moments(high, found)[0] < mean_square:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _moments(middle, found)[0] < mean_square else (low, middle)
    square, along = _moments(high, found)
    return Noise(uniform, max(square - (along / high) ** 2, 0.0), high**2)


def _moments(deviation: float, found: Ulps) -> tuple[float, float]:
    """E[D²] and E[D δ] for δ ~ N(0, τ²), over all sizes of ulps."""
    squares, along = [], []
    for ulp, share in zip(found.sizes, found.shares, strict=True):
        step = ulp / deviation
        if step < 0.25:  # what the sums are then, to the last place
            squares.append(share * (deviation**2 + ulp**2 / 12))
            along.append(share * deviation**2)
            continue
        for j in range(math.ceil(9 / step)):
            a = (j + 0.5) * step
            squares.append(share * (2 * j + 1) * ulp**2 * math.erfc(a / math.sqrt(2)))
            along.append(share * 2 * ulp * deviation * math.exp(-a * a / 2) / _ROOT)
    return math.fsum(squares), math.fsum(along)


_ROOT = math.sqrt(2 * math.pi)


def with_base(noise: Noise, found: Ulps, mean_square: float) -> Noise:
    """`noise` of the tuned side, and that of a base which was rounded on a grid of its own.

    It is in the difference if the tuned model was made from what the base was before. Where the
    difference is smaller than both together, it was made from the rounded base.

    Args:
        noise: Of the tuned side.
        found: Of what the base's weights were rounded to.
        mean_square: ‖ΔW‖² / (m n).
    """
    more = found.mean_square / 12
    if mean_square < _IN_IT * (noise.variance + more):
        return noise
    return Noise(noise.uniform + more, noise.variance + more)


_IN_IT = 0.8


@dataclass(frozen=True, slots=True)
class Signal:
    """What stands above the noise.

    Attributes:
        rank: How many singular values.
        known: Values behind them were seen, too, and the rank is no more.
        fits: What is left has the noise's deviation; None where that cannot be told.
        kept: Share of the update's own energy, ‖ΔW‖² less the noise's, that those values hold, less
            the noise in them; 1 where there is none but noise.
    """

    rank: int
    known: bool
    fits: bool | None
    kept: float


def signal(values: Sequence[float], noise: Noise, shape: tuple[int, int], energy: float) -> Signal:
    """Which singular values are the update's and not noise.

    Those above the edge of uniform noise are. Of an update below an ulp the noise is less, and its
    edge lower; but what rounding does to an update of low rank has structure, whose values may
    stand above that edge. So further ones are taken only until they hold the update's own energy,
    and as long as they stand out of all that is left, too. Where the update's rank is known, it is
    that.

    Args:
        values: The first singular values, falling.
        noise: Of the same matrix.
        shape: Of it.
        energy: ‖ΔW‖².
    """
    m, n = shape
    own = energy - noise.variance * m * n
    rank = _standing(values, noise, shape, energy) if noise.rank is None else noise.rank
    rank = min(rank, len(values))
    held = math.fsum(value * value for value in values[:rank])
    spread = noise.variance * (m + n)  # a signal s appears with s² + σ² (m + n) + …
    found = math.fsum(max(value * value - spread, 0.0) for value in values[:rank])
    kept = min(found / own, 1.0) if own > 0 and found > 0 else float(rank > 0 or own <= 0)
    fits = None
    known = rank < len(values)
    if known and rank < min(shape) and noise.variance * m * n > _SEEN * energy:
        left = max(energy - held, 0.0) / ((m - rank) * (n - rank))
        fits = abs(math.sqrt(left / noise.variance) - 1) <= _FITS
    return Signal(rank, known, fits, kept)


def _standing(values: Sequence[float], noise: Noise, shape: tuple[int, int], energy: float) -> int:
    """How many values stand above the edges."""
    m, n = shape
    own = energy - noise.variance * m * n
    rank = sum(value > _ABOVE_EDGE * _edge(noise.uniform, shape) for value in values)
    held = math.fsum(value * value for value in values[:rank])
    while rank < min(len(values), m - 1, n - 1) and held < own:
        square = values[rank] ** 2
        rest = max(energy - held - square, 0.0) / ((m - rank - 1) * (n - rank - 1))
        if square <= (_ABOVE_EDGE * _edge(max(rest, noise.variance), shape)) ** 2:
            break
        rank, held = rank + 1, held + square
    return rank
