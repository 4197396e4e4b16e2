"""What a user may ask of an extraction: the rank of each module, and what becomes of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from weft.core import dtypes, filters, units
from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.core.filters import Filter


@dataclass(frozen=True, slots=True)
class Rule:
    """Which rank a module gets.

    Attributes:
        kind: `rank`, the same for all; `energy`, the smallest that keeps a share of ‖ΔW‖²; `auto`,
            what stands above the noise of rounding; `size`, the best under a budget of bytes.
        value: The rank, the share or the bytes; 0 for `auto`.
    """

    kind: Literal["rank", "energy", "auto", "size"]
    value: float = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "auto" else f"{self.kind} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Wishes:
    """Everything that an extraction was asked for.

    Attributes:
        rule: Which rank a module gets.
        ranks: Modules with a rank of their own; the first filter that fits counts.
        alpha: For all modules; None makes it each module's rank, and the scaling 1.
        dtype: Of the factors; None takes the base's.
        target: What is decomposed; None for whatever can be.
        save: What is saved in full.
        exclude: What is left as it is in the base.
        embed: What becomes of tables of the vocabulary: `lora`, `save`, `skip`, or None for the
            smaller one of the first two; a tied table is saved in full then.
        uniform: One rank for all modules, and nothing saved in full.
        seed: Of the random vectors.
    """

    rule: Rule
    ranks: tuple[tuple[Filter, int], ...] = ()
    alpha: float | None = None
    dtype: str | None = None
    target: tuple[Filter, ...] | None = None
    save: tuple[Filter, ...] = ()
    exclude: tuple[Filter, ...] = ()
    embed: str | None = None
    uniform: bool = False
    seed: int = 0


_DEFAULT = 32


def wishes_of(
    *,
    rank: int | str | None = None,
    ranks: Sequence[tuple[str, int]] = (),
    energy: float | None = None,
    size: str | int | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
    target: str | None = None,
    save: str | None = None,
    exclude: str | None = None,
    embed: str | None = None,
    uniform_rank: bool = False,
    seed: int = 0,
) -> Wishes:
    """The arguments of `extract`, checked.

    Raises:
        WeftError: One that makes no sense, or two that contradict each other.
    """
    own = tuple((each, rank) for text, rank in ranks for each in filters.parse(text))
    if embed not in (None, "lora", "save", "skip"):
        raise WeftError(f"--embed {embed} is unknown", "one of lora, save, skip")
    if alpha is not None and not alpha > 0:
        raise WeftError(f"an alpha of {alpha:g} makes no sense", "without one it is the rank")
    if any(r < 1 for _, r in own):
        raise WeftError("a rank below 1 makes no sense", "exclude the modules instead")
    for number, (each, rank_of_one) in enumerate(own):
        other = next((r for f, r in own[:number] if f == each and r != rank_of_one), None)
        if other is not None:
            what = f"{each.text} has two ranks, {other} and {rank_of_one}"
            raise WeftError(what, "leave one of them out")
    if uniform_rank and own:
        raise WeftError("--uniform-rank and ranks of single modules contradict each other")
    return Wishes(
        rule=_rule(rank, energy, size),
        ranks=own,
        alpha=alpha,
        dtype=dtypes.parse(dtype) if dtype else None,
        target=filters.parse(target) if target is not None else None,
        save=filters.parse(save or ""),
        exclude=filters.parse(exclude or ""),
        embed=embed,
        uniform=uniform_rank,
        seed=seed,
    )


def _rule(rank: int | str | None, energy: float | None, size: str | int | None) -> Rule:
    named = {"rank": rank, "energy": energy, "size": size}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise WeftError(
            f"{' and '.join(given)} are given, and each of them decides the ranks",
            f"leave out all but one, such as --{given[0]} {named[given[0]]}",
        )
    if energy is not None:
        if not 0 < energy <= 1:
            raise WeftError(f"energy is a share, and {energy:g} is none", "such as --energy 0.95")
        return Rule("energy", energy)
    if size is not None:
        return Rule("size", units.parse_size(str(size)))
    if rank == "auto":
        return Rule("auto")
    try:
        number = int(rank) if rank is not None else _DEFAULT
    except ValueError:
        raise WeftError(f"a rank is a number or auto, and not {rank!r}", "such as 32") from None
    if number < 1:
        raise WeftError(f"a rank of {number} makes no sense", "PEFT has ranks from 1 on")
    return Rule("rank", number)
