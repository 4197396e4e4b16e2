"""Threads that help each other never wait for each other in a circle."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from weft.execute._crew import Crew


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_maps_inside_tasks_end(cores: int) -> None:
    """As many tasks as there are cores map at once; their parts are done by one another."""
    done: list[list[int]] = []
    computing = threading.Semaphore(cores)

    def task() -> None:
        with crew.cores:
            done.append(crew.map([lambda n=n: time.sleep(0.001) or n for n in range(7)]))

    crew = Crew(iter([task] * 20), computing)
    with ThreadPoolExecutor(2 * cores) as pool:
        workers = [pool.submit(crew.work) for _ in range(2 * cores)]
        for worker in workers:
            worker.result(timeout=20)
    assert done == [list(range(7))] * 20


def test_what_a_part_raises_reaches_the_one_who_asked() -> None:
    caught: list[str] = []

    def fail() -> None:
        raise ValueError("part 3")

    def task() -> None:
        with crew.cores:
            try:
                crew.map([lambda: None, fail, lambda: None])
            except ValueError as error:
                caught.append(str(error))

    crew = Crew(iter([task]), threading.Semaphore(1))
    with ThreadPoolExecutor(2) as pool:
        for worker in [pool.submit(crew.work) for _ in range(2)]:
            worker.result(timeout=20)
    assert caught == ["part 3"]


def test_stopped_threads_leave() -> None:
    """Nobody waits on for a result that a stopped thread will not make."""
    ready = threading.Event()

    def waits() -> None:
        ready.set()
        crew.wait_for(lambda: False)

    crew = Crew(iter([waits]), threading.Semaphore(1))
    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(crew.work) for _ in range(2)]
        ready.wait(5)
        crew.stop()
        for worker in workers:
            worker.result(timeout=20)
