"""What a user may ask of an extraction: the rank of each module, and what becomes of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
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
            smaller one of the first two.
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
