"""Threads that share a queue, and help each other where one of them must have a result first."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@dataclass(slots=True)
class _Share:
    """The tasks of one `map`."""

    results: list[Any]
    left: int
    error: BaseException | None = None


@dataclass(slots=True)
class Crew:
    """Tasks are taken in order; those that somebody waits for, before all others.

    Attributes:
        queue: The tasks of the run.
        cores: How many may compute at once; a task of `map` holds one.
    """

    queue: Iterator[Callable[[], None]]
    cores: threading.Semaphore
    stopped: bool = False
    _urgent: deque[tuple[_Share, int, Callable[[], Any]]] = field(default_factory=deque)
    _busy: int = 0
    _change: threading.Condition = field(default_factory=threading.Condition)

    def work(self) -> None:
        """Do tasks until there are no more, and nobody can ask for help any more."""
        while True:
            with self._change:
                while not self._urgent and not self.stopped:
                    task = next(self.queue, None)
                    if task is not None or not self._busy:
                        break
                    self._change.wait()
                if self.stopped:
                    return
                if self._urgent:
                    urgent = self._urgent.popleft()
                    task = None
                elif task is None:
                    return
                else:
                    urgent = None
                    self._busy += 1
            if urgent is not None:
                with self.cores:
                    self._run(*urgent)
                continue
            assert task is not None
            try:
                task()
            finally:
                with self._change:
                    self._busy -= 1
                    self._change.notify_all()

    def stop(self) -> None:
        """Take no more tasks."""
        with self._change:
            self.stopped = True
            self._change.notify_all()

    def map(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of `tasks`, in their order; whoever has time takes part.

        The caller holds one of the cores.

        Raises:
            BaseException: What the first task that failed raised.
        """
        share = _Share([None] * len(tasks), len(tasks))
        with self._change:
            self._urgent.extend((share, number, task) for number, task in enumerate(tasks))
            self._change.notify_all()
        while True:
            with self._change:
                if not share.left:
                    break
                urgent = self._urgent.popleft() if self._urgent else None
            if urgent is not None:
                self._run(*urgent)
                continue
            self.cores.release()  # whoever has the last of the tasks may be waiting for it
            try:
                with self._change:
                    while share.left and not self._urgent:
                        self._change.wait()
            finally:
                self.cores.acquire()
        if share.error is not None:
            raise share.error
        return share.results

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Until `ready`, help those who prepare it; it is looked at after every task."""
        while True:
            with self._change:
                while not self._urgent and not ready() and not self.stopped:
                    self._change.wait()
                if ready() or self.stopped:
                    return
                urgent = self._urgent.popleft()
            with self.cores:
                self._run(*urgent)

    def announce(self) -> None:
        """Something that others wait for has happened."""
        with self._change:
            self._change.notify_all()

    def _run(self, share: _Share, number: int, task: Callable[[], Any]) -> None:
        try:
            if share.error is None and not self.stopped:
                share.results[number] = task()
        except BaseException as error:
            share.error = share.error or error
        finally:
            with self._change:
                share.left -= 1
                if not share.left:
                    self._change.notify_all()


class Alone:
    """Does by itself what others would help with."""

    def map(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        return [task() for task in tasks]
