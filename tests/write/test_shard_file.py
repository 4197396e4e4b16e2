"""Bytes at any offset, past the page cache or through it, are the bytes that were given."""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.core.blocks import PAGE
from weft.write import _shard_file
from weft.write._shard_file import Flusher, ShardFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 20 * PAGE + 123
HEAD = b"{}".ljust(PAGE)
CONTENT = HEAD + os.urandom(SIZE - PAGE)


@pytest.fixture(params=["direct", "cached", "refused"])
def shard(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens the file anew: with O_DIRECT, without, and where it is granted and then refused."""
    if request.param == "cached":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    if request.param == "refused":
        real = os.pwrite

        def pwrite(handle: int, data: memoryview, offset: int) -> int:
            if is_direct(handle):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(handle, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)

    def make() -> ShardFile:
        (tmp_path / "shard").unlink(missing_ok=True)
        return ShardFile(tmp_path / "shard", HEAD, SIZE, Flusher())

    return make


def is_direct(handle: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)


def in_pages(data: bytes, offset: int) -> memoryview:
    """`data` in memory that lies in its pages as a file's bytes from `offset` on."""
    begin = offset % PAGE
    view = memoryview(mmap.mmap(-1, begin + len(data) + PAGE))[begin : begin + len(data)]
    view[:] = data
    return view


@given(
    cuts=st.lists(st.integers(PAGE, SIZE), max_size=12),
    aligned=st.lists(st.booleans(), min_size=13, max_size=13),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_in_any_order_and_thread(
    shard: Callable[[], ShardFile],
    tmp_path: Path,
    cuts: list[int],
    aligned: list[bool],
    order: Any,
) -> None:
    edges = sorted({PAGE, SIZE, *cuts})
    pieces = list(zip(edges, edges[1:], aligned, strict=False))
    order.shuffle(pieces)
    file = shard()

    def write(piece: tuple[int, int, bool]) -> None:
        start, stop, lies_as_the_file = piece
        data = CONTENT[start:stop]
        file.write(in_pages(data, start if lies_as_the_file else start + 1), start)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, pieces))
    file.sync()
    file.close()
    assert (tmp_path / "shard").read_bytes() == CONTENT


@given(
    start=st.integers(0, 3 * PAGE),
    offset=st.integers(PAGE, 3 * PAGE),
    count=st.integers(0, 12 * PAGE),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_copies(
    shard: Callable[[], ShardFile], tmp_path: Path, start: int, offset: int, count: int
) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_shard_file, "COPY_BUFFER", 3 * PAGE)  # several rounds
        file = shard()
        file.copy(source, start, offset, count)
        file.close()
    os.close(source)
    expected = bytearray(HEAD.ljust(SIZE, b"\0"))
    expected[offset : offset + count] = CONTENT[start : start + count]
    assert (tmp_path / "shard").read_bytes() == bytes(expected)


def test_whole_pages_go_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[bool, int, int]] = []
    real = os.pwrite

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        written.append((is_direct(handle), offset, len(data)))
        return real(handle, data, offset)

    file = ShardFile(tmp_path / "shard", HEAD, SIZE, Flusher())
    if not file._past_cache:
        pytest.skip("the file system has no O_DIRECT")
    monkeypatch.setattr(os, "pwrite", pwrite)
    start, stop = 2 * PAGE - 5, 4 * PAGE + 7
    file.write(in_pages(CONTENT[start:stop], start), start)
    file.close()
    assert written == [
        (True, 2 * PAGE, 2 * PAGE),
        (False, start, 5),
        (False, 4 * PAGE, 7),
    ]


def test_the_input_ended(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"short")
    source = os.open(tmp_path / "source", os.O_RDONLY)
    file = ShardFile(tmp_path / "shard", HEAD, SIZE, Flusher())
    with pytest.raises(OSError, match="ended"):
        file.copy(source, 0, PAGE, 6)
    file.close()
    os.close(source)
