"""Progress as events: the library emits them, the console draws them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Started:
    """The run begins to write; totals in bytes, `done` of them by an earlier, resumed run."""

    total: int
    done: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes read from inputs and written to the output since the last event."""

    read: int
    written: int


@dataclass(frozen=True, slots=True)
class Noted:
    """A fact that the user should see while the run goes on."""

    text: str


Event = Started | Moved | Noted
OnEvent = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Take an event and do nothing."""
