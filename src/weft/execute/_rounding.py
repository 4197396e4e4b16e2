"""What rounding put into a difference, told by a sample of the weights that it is taken of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.core.lazy import torch
from weft.core.specs import Merge, Scaled
from weft.decompose.noise import Noise, rounding, scaled_ulps, ulps, uneven, with_base
from weft.plan.extract import stored_as

if TYPE_CHECKING:
    from torch import Tensor

    from weft.decompose.even import Evening
    from weft.decompose.noise import Ulps
    from weft.native import Numbers
    from weft.plan.extract import Change

_SAMPLE = 2**17  # elements by which the size of an ulp is told
_SUMMED = 4  # ulps that a difference made of products is off, at most
NONE = Noise()


class Samples:
    """Every so many-th element of what a difference is taken of.

    Args:
        change: The tensor.
        rows: How many will be seen, in order.
        columns: Of each row.
        even: Is shown how the noise is spread, where that is known.
    """

    def __init__(
        self, change: Change, rows: int, columns: int, even: Evening | None = None
    ) -> None:
        self._columns = columns
        self._even = even
        self._kept = stored_as(change)
        self._eighths = _float8(change)
        self._share = max(1, rows * columns // _SAMPLE)
        self._seen: dict[str, list[Tensor]] = {}

    @property
    def stored(self) -> bool:
        """Every element lies in a file as it is."""
        return self._kept is not None

    @property
    def scaled(self) -> bool:
        """A side is float8 with scales."""
        return any(self._eighths)

    @property
    def _spread(self) -> str | None:
        """The dtype that the tuned weights are stored in, where their size says how noisy each is.

        That of numbers times scales it does not say, nor is there noise worth telling in float64.
        """
        return None if self.scaled or self._kept == "float64" else self._kept

    @property
    def grid(self) -> str | None:
        """The dtype whose numbers both sides are; None where one is not, or scaled."""
        if not self._seen or self.scaled or self._kept in (None, "float64"):
            return None
        dtype, on_grid = _grid(self._all("tuned"), self._all("base"), self._kept)
        return dtype if on_grid else None

    def add(self, what: str, block: Tensor) -> None:
        """Keep some of a block, `what` being `tuned`, `base`, `tuned scale` or `base scale`."""
        self._keep(what, self._some(block).clone())  # and not a view of all of it

    def add_tuned(self, base: Tensor, delta: Tensor) -> None:
        """The tuned weights; of those that lie nowhere, the difference is what was rounded."""
        stored = self._kept or self._eighths[0]
        some = self._some(delta)
        self._keep("tuned", self._some(base) + some if stored else some.clone())
        if self._even is not None and self._spread is not None:
            self._even.add(uneven(base + delta, self._spread))

    def add_stored(self, tuned: Numbers, base: Numbers) -> None:
        """Both sides of a block, as they lie in their files."""
        for what, side in (("tuned", tuned), ("base", base)):
            self._keep(what, self._some(side.tensor()).to(torch.float32, copy=True))
        if self._even is not None and self._spread is not None:
            rows = tuned.tensor().view(-1, self._columns).float()
            self._even.add(uneven(rows, self._spread))

    def _some(self, block: Tensor) -> Tensor:
        return block.reshape(-1)[:: self._share]

    def _keep(self, what: str, some: Tensor) -> None:
        self._seen.setdefault(what, []).append(some.cpu())

    def noise(self, mean_square: float) -> Noise:
        """In a difference of this ‖ΔW‖² / (m n)."""
        if not self._seen or self._kept == "float64":
            return NONE
        tuned, base = self._all("tuned"), self._all("base")
        ours, theirs = self._eighths
        if ours:
            scale = self._all("tuned scale")
            same = ours == theirs and torch.equal(scale, self._all("base scale"))
            found = rounding(scaled_ulps(tuned, scale, ours), mean_square, on_grid=same)
        else:
            same = False
            found = _plain(tuned, base, self._kept, mean_square)
        if theirs and not same:
            own: Ulps = scaled_ulps(base, self._all("base scale"), theirs)
            found = with_base(found, own, mean_square)
        return found

    def _all(self, what: str) -> Tensor:
        return torch.cat(self._seen[what]).float()


def _float8(change: Change) -> tuple[str | None, str | None]:
    """The float8 dtypes of both sides, for all parts of the tensor."""
    found = []
    for side in ("inputs", "base"):
        dtypes = set()
        for job in change.jobs:
            merge = job.expression
            each = getattr(merge, side) if isinstance(merge, Merge) else None
            each = each[0] if isinstance(each, tuple) else each
            dtypes.add(each.ref.dtype if isinstance(each, Scaled) else None)
        found.append(dtypes.pop() if len(dtypes) == 1 else None)
    return found[0], found[1]


def _grid(tuned: Tensor, base: Tensor, dtype: str) -> tuple[str, bool]:
    """What the tuned side was rounded to, be it copied to a wider one; and whether the base was."""
    if dtype == "float32" and torch.equal(tuned.bfloat16().float(), tuned):
        dtype = "bfloat16"
    return dtype, torch.equal(base.to(getattr(torch, dtype)).float(), base)


def _plain(tuned: Tensor, base: Tensor, dtype: str | None, mean_square: float) -> Noise:
    """Of what lies in `dtype`, or in a wider one that it was copied to.

    What lies nowhere (None) was computed in float32, as a sum: some ulps of the difference itself.

    The rounding of BASE is not in it: a model is tuned from the base as it is stored, and that is
    exact then. Of a TUNED and a BASE that were both rounded, from wider weights, the deviation is
    √(σ² + σ²), √2 of this one, which shows in what is left of ΔW (`Signal.fits`).
    """
    if dtype is None:
        whole = _SUMMED**2 * ulps(tuned, "float32").mean_square / 12
        return Noise(whole, whole)
    dtype, on_grid = _grid(tuned, base, dtype)
    return rounding(ulps(tuned, dtype), mean_square, on_grid=on_grid)
