"""What a run looks like while it goes on; the one door to rich. Everything here goes to stderr."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weft.core.events import Event, Moved, Noted, OnEvent, Started, ignore
from weft.core.units import clean

if TYPE_CHECKING:
    from collections.abc import Iterator


def say(kind: str, text: str) -> None:
    """`warning: …` or `note: …` on stderr."""
    print(f"{kind}: {clean(text)}", file=sys.stderr)


@contextmanager
def progress(*, quiet: bool, doing: str = "merging", writes: bool = True) -> Iterator[OnEvent]:
    """A function to give to the library: it draws a bar in bytes, with rates, on a terminal.

    A run that writes nothing reports what it has read as done.

    No bar where stderr is no terminal, or with HF_HUB_DISABLE_PROGRESS_BARS; nothing if `quiet`.
    """
    if quiet:
        yield ignore
        return
    if not sys.stderr.isatty() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0") not in (
        *("0", "", "false", "no", "off"),
    ):
        yield _notes
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn(doing),
        BarColumn(),
        DownloadColumn(),
        TextColumn(
            "read {task.fields[read_rate]:.2f} GB/s"
            + (", write {task.fields[write_rate]:.2f} GB/s" if writes else "")
        ),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        yield _Drawing(bar).on_event


def _notes(event: Event) -> None:
    if isinstance(event, Noted):
        say("note", event.text)


class _Drawing:
    """Adds up what the threads report; rates are means since the start."""

    def __init__(self, bar: object) -> None:
        from rich.progress import Progress

        assert isinstance(bar, Progress)
        self._bar = bar
        self._task = bar.add_task("bytes", total=None, read_rate=0.0, write_rate=0.0)
        self._lock = threading.Lock()
        self._read = self._written = 0

    def on_event(self, event: Event) -> None:
        if isinstance(event, Noted):
            self._bar.console.print(f"note: {clean(event.text)}", markup=False, highlight=False)
        elif isinstance(event, Started):
            self._bar.update(self._task, total=event.total, completed=event.done)
        elif isinstance(event, Moved):
            with self._lock:
                self._read += event.read
                self._written += event.written
            elapsed = self._bar.tasks[self._task].elapsed or 1e-9
            self._bar.update(
                self._task,
                advance=event.written,
                read_rate=self._read / elapsed / 1e9,
                write_rate=self._written / elapsed / 1e9,
            )
