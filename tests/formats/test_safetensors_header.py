"""The reader of safetensors headers against random files, and against the reference library."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from weft.core.dtypes import CODES, NAMES, itemsize
from weft.core.errors import FormatError, NotFound
from weft.formats.safetensors import MAX_HEADER, build_header, read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weft.formats.safetensors import Header

MEMORY = 50_000_000  # bytes that no small file may make the reader take
# The same files every time; with WEFT_FUZZ=100000 that many others.
EXAMPLES = int(os.environ.get("WEFT_FUZZ", "0"))
settings.register_profile(
    "weft",
    max_examples=EXAMPLES or 250,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
weft_settings = settings.get_profile("weft")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "it.safetensors"


def read(file: Path, data: bytes) -> Header | None:
    """The header of a file of `data`, or None if it is refused; nothing else may happen."""
    file.write_bytes(data)
    with modest_memory():
        try:
            header = read_header(file)
        except FormatError:
            return None
    assert_sound(header, data)
    return header


@contextmanager
def modest_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY


def assert_sound(header: Header, data: bytes) -> None:
    """Every byte behind the header belongs to exactly one tensor, of the size that it should be."""
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    owners = [0] * (len(data) - begin)
    for ref in header.tensors:
        assert begin <= ref.start <= ref.stop <= len(data)
        assert ref.nbytes == ref.numel * itemsize(ref.dtype)
        assert all(type(size) is int and size >= 0 for size in ref.shape)
        for byte in range(ref.start, ref.stop):
            owners[byte - begin] += 1
    assert owners == [1] * len(owners)
    assert [ref.start for ref in header.tensors] == sorted(ref.start for ref in header.tensors)
    assert len({ref.name for ref in header.tensors}) == len(header.tensors)
    assert all(isinstance(v, str) for item in header.metadata.items() for v in item)


def reference(data: bytes) -> list[tuple[str, dict[str, Any]]] | None:
    """What the reference implementation makes of the same bytes; None if it refuses them."""
    try:
        return safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None


def assert_same(header: Header, found: list[tuple[str, dict[str, Any]]], data: bytes) -> None:
    mine = {
        ref.name: (CODES[ref.dtype], list(ref.shape), data[ref.start : ref.stop])
        for ref in header.tensors
    }
    theirs = {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in found}
    assert mine == theirs


# ------------------------------------------------------------------------------- where they differ

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def spelt(text: str, size: int = 4) -> bytes:
    """A file with this header, in which `@` stands for a sound entry of 4 bytes."""
    raw = text.replace("@", json.dumps(ENTRY)).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(size)


# What the reference implementation reads and Weft refuses, and why; nothing else may differ.
STRICTER = {
    "a tensor twice: the reference takes the last, others the first": spelt('{"a":@,"a":@}'),
    "a metadata key twice": spelt('{"__metadata__":{"x":"1","x":"2"},"a":@}'),
    "an unknown field: it could change what the others mean": spelt(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"scale":2}}'
    ),
    "an entry as a list": spelt('{"a":["F32",[1],[0,4]]}'),
    "a dtype as a mapping": spelt('{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}'),
    "F4, of which two elements share a byte": spelt(
        '{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    ),
    "F6_E2M3, likewise": spelt('{"a":{"dtype":"F6_E2M3","shape":[16],"data_offsets":[0,12]}}', 12),
    "F6_E3M2, likewise": spelt('{"a":{"dtype":"F6_E3M2","shape":[16],"data_offsets":[0,12]}}', 12),
}
# What Weft reads and the reference implementation refuses, and why.
LAXER = {
    "-0 is an offset: Python reads it as 0": spelt(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}'
    ),
}
# What both refuse, though json.loads of Python reads it.
BOTH = {
    "metadata is an empty list": spelt('{"__metadata__":[],"a":@}'),
    "metadata is false": spelt('{"__metadata__":false,"a":@}'),
    "metadata is 0": spelt('{"__metadata__":0,"a":@}'),
    "metadata is an empty string": spelt('{"__metadata__":"","a":@}'),
    "half a surrogate pair in a name": spelt('{"\\ud800":@}'),
    "half a surrogate pair in the metadata": spelt('{"__metadata__":{"x":"\\ud800"},"a":@}'),
    "a size beyond 64 bits beside a 0": spelt(
        '{"a":@,"b":{"dtype":"F32","shape":[18446744073709551616,0],"data_offsets":[4,4]}}'
    ),
    "a product beyond 64 bits before a 0": spelt(
        '{"a":@,"b":{"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[4,4]}}'
    ),
}


@pytest.mark.parametrize("reason", STRICTER)
def test_stricter_than_the_reference(reason: str, file: Path) -> None:
    assert reference(STRICTER[reason]) is not None
    assert read(file, STRICTER[reason]) is None


@pytest.mark.parametrize("reason", LAXER)
def test_laxer_than_the_reference(reason: str, file: Path) -> None:
    assert reference(LAXER[reason]) is None
    assert read(file, LAXER[reason]) is not None


@pytest.mark.parametrize("reason", BOTH)
def test_no_laxer_than_that(reason: str, file: Path) -> None:
    assert reference(BOTH[reason]) is None
    assert read(file, BOTH[reason]) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"a":@}   ',
        ' {"a":@}',
        '{"__metadata__":null,"a":@}',  # as MLX writes it
        '{"a":@}\n',
        '{"":@}',
        '{"\\u0000":@}',
        '{"a":@,"b":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}',
        '{"a":@,"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        '{"a":{"shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4],"dtype":"F32"}}',
        '{"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]},"a":@}',
    ],
)
def test_unusual_and_sound(text: str, file: Path) -> None:
    data = spelt(text, 8 if '"U8"' in text else 4)
    found, header = reference(data), read(file, data)
    assert header is not None
    assert found is not None
    assert_same(header, found, data)


def explained(data: bytes) -> bool:
    """Whether these bytes are refused by us alone for one of the reasons in STRICTER."""
    raw = data[8 : 8 + struct.unpack("<Q", data[:8])[0]]
    twice = False

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        twice = twice or len({key for key, _ in items}) < len(items)
        return dict(items)

    content = json.loads(raw, object_pairs_hook=pairs)
    return twice or any(
        not isinstance(entry, dict)
        or set(entry) != set(ENTRY)
        or not isinstance(entry["dtype"], str)
        or entry["dtype"] not in NAMES
        for name, entry in content.items()
        if name != "__metadata__"
    )


def assert_agrees(file: Path, data: bytes) -> None:
    """Both read it and find the same, or both refuse it, or the difference is a known one."""
    header, found = read(file, data), reference(data)
    if header is not None and found is not None:
        assert_same(header, found, data)
    elif found is not None:
        assert explained(data), f"only we refuse {data!r}"
    elif header is not None:
        assert b"-0" in data, f"only we read {data!r}"


# ------------------------------------------------------------------------------------------ random

VALID = [
    save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}),
    save({"w.weight": torch.zeros(2, 0), "n": torch.tensor(3)}, {"format": "pt", "ü": "é"}),
    save({str(n): torch.tensor([n], dtype=torch.uint8) for n in range(12)}),
    spelt('{"a":@}'),
    spelt("{}", 0),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A sound file with some bytes changed, left out, put in, or cut off."""
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "digit", "delete", "insert", "cut", "repeat"])):
            case "flip" if data:
                data[at] = draw(st.integers(0, 255))
            case "digit":
                digits = [n for n, byte in enumerate(data) if chr(byte).isdigit()]
                if digits:
                    data[draw(st.sampled_from(digits))] = draw(st.sampled_from(b"0123456789-."))
            case "delete":
                del data[at : at + draw(st.integers(1, 9))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "cut":
                del data[at:]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 60))]
    return bytes(data)


def relength(data: bytes) -> bytes:
    """The same with the header's length made right again, so that what is inside gets read."""
    end = data.rfind(b"}") + 1
    return struct.pack("<Q", max(end - 8, 0)) + data[8:]


@weft_settings
@given(mutated(), st.booleans())
def test_mutated_files(file: Path, data: bytes, right_length: bool) -> None:
    assert_agrees(file, relength(data) if right_length and len(data) > 8 else data)


@weft_settings
@given(st.binary(max_size=64), st.integers(0, 2**64 - 1) | st.integers(0, 80))
def test_random_bytes(file: Path, tail: bytes, length: int) -> None:
    assert_agrees(file, struct.pack("<Q", length) + tail)


names = st.text(max_size=6) | st.sampled_from(["a", "b", "__metadata__", "dtype"])
sizes = (
    st.integers(-2, 9)
    | st.integers(0, 2**70)
    | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, -(2**63)])
)
scalars = sizes | st.floats(allow_nan=False) | st.booleans() | st.none() | st.text(max_size=4)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)
)
entry_like = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*NAMES, "F4", "F6_E2M3", "f32", ""]) | values,
        "shape": st.lists(sizes, max_size=3) | values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values,
    },
    optional={"extra": scalars},
)
header_like = st.dictionaries(names, entry_like | values, max_size=4) | values


@weft_settings
@given(header_like, st.integers(0, 40))
def test_random_json(file: Path, content: Any, size: int) -> None:
    raw = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert_agrees(file, struct.pack("<Q", len(raw)) + raw + bytes(size))


@st.composite
def laid_out(draw: st.DrawFn) -> bytes:
    """Entries that could be sound: right sizes, one after the other, with a slip now and then."""
    content: dict[str, Any] = {}
    offset = 0
    for name in draw(st.lists(names, max_size=5, unique=True)):
        code = draw(st.sampled_from(sorted(NAMES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = itemsize(NAMES[code])
        for n in shape:
            size *= n
        size += draw(st.sampled_from([0] * 20 + [1, -1]))
        offset += draw(st.sampled_from([0] * 20 + [1, -1]))
        content[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(dict(draw(st.permutations(sorted(content.items()))))).encode()
    rest = max(offset + draw(st.sampled_from([0] * 20 + [1, -1])), 0)
    return struct.pack("<Q", len(raw)) + raw + bytes(n % 251 for n in range(rest))


@weft_settings
@given(laid_out())
def test_random_layouts(file: Path, data: bytes) -> None:
    assert_agrees(file, data)


def test_random_layouts_are_not_all_refused(file: Path) -> None:
    """The strategy above finds sound files, too, or it would prove nothing."""
    seen: list[bool] = []

    @settings(weft_settings, max_examples=100)
    @given(laid_out())
    def look(data: bytes) -> None:
        seen.append(read(file, data) is not None)

    look()
    assert 10 < sum(seen) < len(seen) - 10


@pytest.mark.parametrize("claim", [MAX_HEADER + 1, 10**9, 2**31, 2**40, 2**63, 2**64 - 1])
def test_length_alone_allocates_nothing(claim: int, file: Path) -> None:
    assert read(file, struct.pack("<Q", claim) + b"{}") is None


def test_length_up_to_the_limit_is_read(file: Path) -> None:
    """A sparse file as long as it claims: refused for its content, not believed for its size."""
    with file.open("wb") as out:
        out.write(struct.pack("<Q", 10_000_000))
        out.truncate(8 + 10_000_000)
    with modest_memory(), pytest.raises(FormatError, match="not JSON"):
        read_header(file)


def test_missing_file(file: Path) -> None:
    with pytest.raises(NotFound, match=r"no such file: .*it\.safetensors"):
        read_header(file)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="Is a directory"):
        read_header(tmp_path)


def test_hash_is_of_the_header_alone(file: Path) -> None:
    one = save({"a": torch.zeros(4)})
    other = save({"a": torch.ones(4)})
    renamed = save({"b": torch.zeros(4)})
    hashes = []
    for data in (one, other, renamed):
        file.write_bytes(data)
        hashes.append(read_header(file).source.header)
    assert hashes[0] == hashes[1] != hashes[2]


# -------------------------------------------------------------------------------------- round trip

# Names and metadata as a header can hold them: all of Unicode but halves of surrogate pairs.
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
# The reference's torch loader has no F8_E8M0 yet.
loadable = sorted(set(CODES) - {"float8_e8m0fnu"})
specs = st.lists(
    st.tuples(
        text.filter(lambda name: name != "__metadata__"),
        st.sampled_from(loadable),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec[0],
)


@weft_settings
@given(specs, st.dictionaries(text, text, max_size=3), st.randoms(use_true_random=False))
def test_round_trip(file: Path, wanted: list[Any], metadata: dict[str, str], random: Any) -> None:
    head, offsets = build_header(wanted, metadata)
    assert len(head) % 8 == 0
    data = bytearray(head)
    tensors: dict[str, bytes] = {}
    for name, dtype, shape in wanted:
        assert offsets[name] == len(data)
        count = itemsize(dtype)
        for n in shape:
            count *= n
        low = 2 if dtype == "bool" else 256
        tensors[name] = bytes(random.randrange(low) for _ in range(count))
        data += tensors[name]
    loaded = load(bytes(data))
    assert set(loaded) == set(tensors)
    for name, dtype, shape in wanted:
        assert loaded[name].dtype == getattr(torch, dtype)
        assert tuple(loaded[name].shape) == shape
        raw = loaded[name].contiguous().view(-1).view(torch.uint8)
        assert bytes(raw.numpy()) == tensors[name]
    header = read(file, bytes(data))
    assert header is not None
    assert header.metadata == metadata
    assert [(ref.name, ref.dtype, ref.shape) for ref in header.tensors if ref.nbytes] == [
        spec for spec in wanted if tensors[spec[0]]
    ]
    with safetensors.safe_open(file, "pt") as opened:
        assert (opened.metadata() or {}) == metadata


def test_every_dtype_of_the_reference_is_known() -> None:
    """Codes that the reference's torch loader has, and we do not, would be refused for nothing."""
    from safetensors.torch import _TYPES

    assert {code: f"torch.{name}" for code, name in NAMES.items() if code in _TYPES} == {
        code: str(dtype) for code, dtype in _TYPES.items()
    }


@pytest.mark.parametrize("broken", [lambda head: head[:-1], lambda head: head + b"}"])
def test_round_trip_would_notice(broken: Callable[[bytes], bytes], file: Path) -> None:
    head, _ = build_header([("a", "float32", (1,))], {})
    with pytest.raises(safetensors.SafetensorError):
        load(broken(head) + bytes(4))


@weft_settings
@given(mutated() | laid_out())
def test_whatever_is_read_can_be_written_again(file: Path, data: bytes) -> None:
    """Names and metadata that came out of a file go into another one."""
    header = read(file, data)
    if header is None:
        return
    head, _ = build_header([(r.name, r.dtype, r.shape) for r in header.tensors], header.metadata)
    body = b"".join(data[ref.start : ref.stop] for ref in header.tensors)
    again = read(file, head + body)
    assert again is not None
    assert again.metadata == header.metadata
    assert {(r.name, r.dtype, r.shape) for r in again.tensors} == {
        (r.name, r.dtype, r.shape) for r in header.tensors
    }
