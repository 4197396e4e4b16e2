"""Orthogonal wavelets: the low-pass filters that put a signal together again, of sum √2.

Daubechies' wavelet of order N and the symlets come from one polynomial, Σₖ binom(N − 1 + k, k) yᵏ:
every root of it is a pair of roots z, 1/z of the filter, of which one is taken, always the smaller
(extremal phase), or so that the phase is as linear as can be. Then the filter is the product of
(1 + z)ᴺ and the factors of the roots (I. Daubechies, Ten Lectures on Wavelets, 1992, chapters 6 and
8). The coiflets solve equations without such a form: their coefficients are tabulated there.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

# Bit n: of the n-th pair of roots, in the order of their real parts, the larger one is taken.
_LINEAR_PHASE = {2: 0, 3: 0, 4: 2, 5: 1, 6: 5, 7: 1, 8: 10, 9: 6, 10: 21}
_COIFLETS = {
    1: (
        *(-0.07273261951252645, 0.3378976624574818, 0.8525720202116004, 0.3848648468648578),
        *(-0.07273261951252645, -0.015655728135791993),
    ),
    2: (
        *(0.01638733646320364, -0.04146493678687178, -0.0673725547237256, 0.3861100668227629),
        *(0.8127236354494135, 0.4170051844232391, -0.07648859907828076, -0.05943441864643109),
        *(0.02368017194684777, 0.005611434819368834, -0.0018232088709110323),
        -0.000720549445520347,
    ),
    3: (
        *(-0.003793512864380802, 0.007782596425672746, 0.023452696142077168),
        *(-0.06577191128146936, -0.06112339000297255, 0.40517690240911824, 0.7937772226260872),
        *(0.42848347637737, -0.07179982161915484, -0.08230192710629983, 0.03455502757329774),
        *(0.015880544863669452, -0.009007976136730624, -0.0025745176881367972),
        *(0.0011175187708306303, 0.0004662169598204029, -7.0983302506379e-05),
        -3.459977319727278e-05,
    ),
}


@cache
def low_pass(family: str) -> tuple[float, ...]:
    """The filter of `db1` to `db10`, `sym2` to `sym10` or `coif1` to `coif3`."""
    order = int(family.lstrip("bcdfimosy"))
    if family.startswith("coif"):
        return _COIFLETS[order]
    return _factored(order, _LINEAR_PHASE[order] if family.startswith("sym") else 0)


def high_pass(low: tuple[float, ...]) -> tuple[float, ...]:
    """The mirror image, with every other sign changed."""
    return tuple(-value if n % 2 else value for n, value in enumerate(reversed(low)))


def _factored(order: int, larger: int) -> tuple[float, ...]:
    roots = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    above = sorted(
        (y for y in roots.tolist() if y.imag > -1e-9), key=lambda y: (round(y.real, 9), y.imag)
    )
    filter_ = np.ones(1)
    for n, y in enumerate(above):
        z = min(np.roots([1, 4 * y - 2, 1]).tolist(), key=abs)
        z = 1 / z if larger >> n & 1 else z
        # A complex root comes with its conjugate.
        factor = [1, -z.real] if abs(y.imag) < 1e-9 else [1, -2 * z.real, abs(z) ** 2]
        filter_ = np.convolve(filter_, factor)
    for _ in range(order):
        filter_ = np.convolve(filter_, [1, 1])
    return tuple((filter_ * (math.sqrt(2) / filter_.sum())).tolist())
