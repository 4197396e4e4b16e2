"""The errors a user can meet, each with the exit code that the command line ends with.

* WeftError (2)           the user can fix it; `hint` says how
  x NotFound (2)          a path, a hub id or a file inside it does not exist
  x FormatError (2)       a file breaks its own format
  x Unsupported (2)       recognised, and refused by name
  x PlanError (2)         inputs that do not fit each other; holds every problem found
    x RecipeError (2)     a recipe that cannot be meant; holds every problem found
  x OutputError (2)       the output cannot be written, or must not be overwritten
  x NumericsError (2)     NaN or infinity in an input, or an overflow in the output

Anything else that reaches the command line is a defect of Weft and ends with exit code 3.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


_LAYER = re.compile(r"(?<=[._])\d+(?=[._])")  # its number, in the name of a tensor
_PLACES = 8  # of one fact that are listed


class WeftError(Exception):
    """What happened, and what to do next."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class NotFound(WeftError):
    """A path, a hub id or a file inside it does not exist."""


class FormatError(WeftError):
    """A file breaks its own format."""


class Unsupported(WeftError):
    """Recognised, and refused by name."""


class OutputError(WeftError):
    """The output cannot be written, or must not be overwritten."""


class NumericsError(WeftError):
    """NaN or infinity in an input, or an overflow in the output."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the inputs.

    Attributes:
        what: The fact, with the tensor, the file and the shapes.
        hint: The way out, if there is one beyond fixing the fact.
        at: Line and column, of what is wrong with a file that people write.
    """

    what: str
    hint: str | None = None
    at: tuple[int, int] | None = None


class PlanError(WeftError):
    """Inputs that do not fit each other; every problem of the run is listed at once."""

    def __init__(self, subject: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = [f"{count} with {subject}"]
        # A defect of the whole adapter is the same in every layer: one line stands for all.
        alike: dict[str, list[str]] = {}
        for problem in self.problems:
            alike.setdefault(_LAYER.sub("*", problem.what), []).append(problem.what)
        for first, *others in alike.values():
            lines.append(f"  - {first}" + (f" (and {len(others)} more like it)" if others else ""))
        hints = list(dict.fromkeys(problem.hint for problem in self.problems if problem.hint))
        super().__init__("\n".join(lines), "\n".join(hints[:4]) or None)


class RecipeError(PlanError):
    """A recipe that cannot be meant; every problem of the file, each with its place and its cure.

    They come in the order of the lines. The place follows the fact after `  @ `, so that facts of
    several places show once, with the lines of the others behind it.
    """

    def __init__(self, name: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.at or (math.inf, 0)))
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = [f"{count} in {name}"]
        alike: dict[tuple[str, str | None], list[Problem]] = {}
        for problem in self.problems:
            fact = _LAYER.sub("*", problem.what.split("  @ ")[0])
            alike.setdefault((fact, problem.hint), []).append(problem)
        for (_, hint), (first, *others) in alike.items():
            lines.append(f"  - {first.what}{_and_more(first, others)}")
            lines += [f"      {line}" for line in (hint or "").split("\n") if line]
        WeftError.__init__(self, "\n".join(lines))


def _and_more(first: Problem, others: Sequence[Problem]) -> str:
    """` (and 2 more: line 7, column 9; line 9, column 9)`."""
    if not others:
        return ""
    places = [each.at for each in others if each.at and each.at != first.at]
    said = [f"line {line}, column {column}" for line, column in dict.fromkeys(places)]
    rest = ["…"] if len(said) > _PLACES else []
    shown = "; ".join(said[:_PLACES] + rest)
    return f" (and {len(others)} more{f': {shown}' if shown else ''})"


def as_problems(error: WeftError) -> tuple[Problem, ...]:
    """What the error says, each for itself."""
    if isinstance(error, PlanError):
        return error.problems
    return (Problem(str(error), error.hint),)
