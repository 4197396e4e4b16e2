"""What is wrong with a file, gathered: nobody should have to fix a recipe in five rounds."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from weft.core.errors import Problem, RecipeError
from weft.core.units import clean
from weft.recipes._yaml import place

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weft.recipes._yaml import Document, Loc


class Faults:
    """Every problem of one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._found: dict[tuple[int, int, str], Problem] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(
        self, document: Document, loc: Loc, what: str, cure: str | None = None, *, key: bool = False
    ) -> None:
        """`what` is wrong at `loc`; with `key`, it is the key itself and not what it says."""
        line, column = position(document, loc)
        named = place(loc[:-1] if key else loc)
        at = f"{named}, " if named else ""
        fact = f"{clean(what)}  @ {at}line {line}, column {column}"
        self._found.setdefault((line, column, what), Problem(fact, cure, (line, column)))

    @property
    def problems(self) -> list[Problem]:
        """In the order in which they were found."""
        return list(self._found.values())

    def check(self) -> None:
        """Raises RecipeError, if there is anything."""
        if self._found:
            raise RecipeError(self.name, self.problems)


def position(document: Document, loc: Loc) -> tuple[int, int]:
    """Line and column of `loc`, or of what holds it."""
    while loc and loc not in document.positions:
        loc = loc[:-1]
    return document.positions.get(loc, (1, 1))


def to_write(document: Document, loc: Loc, line: str, whose: str) -> str:
    """A line that belongs under the `parameters` of the mapping at `loc`, which may be there."""
    if (*loc, "parameters") in document.positions:
        return f"write under the `parameters` {whose}:\n  {line}"
    return f"write under {'it' if loc else f'the `parameters` {whose}'}:\nparameters:\n  {line}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name that was probably meant."""
    plain = {each.lower().replace("-", "_"): each for each in known}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), plain, 1, 0.7)
    return plain[found[0]] if found else None


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`unknown key "densty", did you mean "density"?`."""
    meant = nearest(name, known)
    return f'unknown {what} "{name}"' + (f', did you mean "{meant}"?' if meant else "")
