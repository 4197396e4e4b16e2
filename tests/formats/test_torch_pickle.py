"""Byte ranges in torch's own files, against torch.load: the same names, shapes and bytes."""

from __future__ import annotations

import functools
import io
import os
import struct
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.core.dtypes import CODES
from weft.core.errors import FormatError, NotFound, Unsupported, WeftError
from weft.formats.torch_pickle import read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from weft.formats.safetensors import Header

LAYOUTS = {"zip": True, "legacy": False}
# Names of every dtype that safetensors can store, too; and those that older torch could save.
DTYPES = sorted(CODES)
OLD_DTYPES = sorted(
    {
        *("bool", "uint8", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64"),
    }
)
# What torch says while it reads and writes files of old.
pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> bool:
    return LAYOUTS[request.param]


def save(state: Any, file: Path, layout: bool) -> None:
    torch.save(state, file, _use_new_zipfile_serialization=layout)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def some(dtype: str, count: int = 12) -> Tensor:
    """`count` elements with every byte a different one, as far as the dtype allows."""
    kind = getattr(torch, dtype)
    data = torch.arange(count * kind.itemsize, dtype=torch.uint8)
    return (data % 2).bool() if dtype == "bool" else data.view(kind)


def assert_as_loaded(file: Path) -> Header:
    """Torch itself, which loads the whole file, finds the same tensors and the same bytes."""
    header = read_header(file)
    loaded: Mapping[str, Tensor] = torch.load(file, weights_only=True)
    data = file.read_bytes()
    mine = {
        ref.name: (f"torch.{ref.dtype}", ref.shape, data[ref.start : ref.stop])
        for ref in header.tensors
    }
    assert mine == {
        name: (str(tensor.dtype), tuple(tensor.shape), raw(tensor))
        for name, tensor in loaded.items()
    }
    assert [ref.start for ref in header.tensors] == sorted(ref.start for ref in header.tensors)
    assert {ref.file for ref in header.tensors} <= {str(file)}
    return header


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_in_zip(dtype: str, file: Path) -> None:
    save({"a": some("float32", 3), "b": some(dtype).view(3, 4)}, file, True)
    assert_as_loaded(file)


@pytest.mark.parametrize("dtype", OLD_DTYPES)
def test_every_dtype_in_legacy(dtype: str, file: Path) -> None:
    save({"a": some("float32", 3), "b": some(dtype).view(3, 4)}, file, False)
    assert_as_loaded(file)


@pytest.mark.parametrize("dtype", sorted(set(DTYPES) - set(OLD_DTYPES)))
def test_new_dtypes_in_legacy(dtype: str, file: Path) -> None:
    """They are stored untyped: torch writes them, and cannot read them."""
    state = {"a": some("float32", 3), "b": some(dtype).view(3, 4)}
    save(state, file, False)
    with pytest.raises(AttributeError):
        torch.load(file, weights_only=True)
    data = file.read_bytes()
    found = {ref.name: (ref.dtype, data[ref.start : ref.stop]) for ref in read_header(file).tensors}
    assert found == {"a": ("float32", raw(state["a"])), "b": (dtype, raw(state["b"]))}


def test_shapes(file: Path, layout: bool) -> None:
    state = {
        "scalar": torch.tensor(3.0),
        "one": torch.ones(1),
        "deep": torch.arange(24.0).view(2, 3, 2, 2),
        "none": torch.empty(0),
        "no.rows": torch.empty(0, 7),
        "last": torch.ones(2, 3, dtype=torch.int8),
    }
    save(state, file, layout)
    header = assert_as_loaded(file)
    assert {ref.name: ref.shape for ref in header.tensors} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }


def test_shared_storage(file: Path, layout: bool) -> None:
    """Tied weights: two names, one place."""
    tied = torch.randn(5, 4)
    save({"head": tied, "body": torch.randn(3), "embedding": tied}, file, layout)
    places = {ref.name: (ref.start, ref.stop) for ref in assert_as_loaded(file).tensors}
    assert places["head"] == places["embedding"] != places["body"]


def test_views_with_offsets(file: Path, layout: bool) -> None:
    """Parts of one storage, out of order, overlapping, and with nothing that holds the rest."""
    whole = torch.arange(100, dtype=torch.float32)
    state = {
        "end": whole[90:],
        "middle": whole[20:40].view(4, 5),
        "within": whole[25:30],
        "row": whole.view(10, 10)[3],
        "other": torch.arange(7, dtype=torch.int16)[2:5],
    }
    save(state, file, layout)
    header = assert_as_loaded(file)
    places = {ref.name: ref.start for ref in header.tensors}
    assert places["end"] - places["middle"] == 70 * 4
    assert places["within"] - places["middle"] == 5 * 4


def test_order_of_bytes_is_not_that_of_names(file: Path) -> None:
    tensors = {name: torch.full((3,), float(n)) for n, name in enumerate("zxy")}
    save(OrderedDict(tensors), file, True)
    assert [ref.name for ref in assert_as_loaded(file).tensors] == list("zxy")


def test_parameters_and_module_state(file: Path, layout: bool) -> None:
    """A state dict as a module makes it: ordered, with `_metadata`, of parameters and buffers."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    save(module.state_dict(keep_vars=True), file, layout)
    header = assert_as_loaded(file)
    assert {ref.name for ref in header.tensors} == set(module.state_dict())


def test_many_tensors(file: Path, layout: bool) -> None:
    save(
        {f"layer.{n}.weight": torch.full((n % 7 + 1, 3), float(n)) for n in range(300)},
        file,
        layout,
    )
    assert len(assert_as_loaded(file).tensors) == 300


def test_non_ascii_names(file: Path, layout: bool) -> None:
    save({"größe": torch.ones(2), "层.0": torch.zeros(2), "a b": torch.ones(1)}, file, layout)
    assert_as_loaded(file)


def test_from_the_gpu(file: Path, layout: bool) -> None:
    """The location that is in the file does not matter: no GPU is needed to read it."""
    save({"a": torch.arange(4.0)}, file, layout)
    data = file.read_bytes().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    if layout:
        data = rezipped(
            io.BytesIO(file.read_bytes()), {b"X\x03\x00\x00\x00cpu": b"X\x06\x00\x00\x00cuda:0"}
        )
    file.write_bytes(data)
    (ref,) = read_header(file).tensors
    assert file.read_bytes()[ref.start : ref.stop] == raw(torch.arange(4.0))


# --------------------------------------------------------------------- archives of another making


def rezipped(
    source: io.BytesIO,
    changes: Mapping[bytes, bytes] | None = None,
    order: list[str] | None = None,
    extra: int = 0,
) -> bytes:
    """The same records packed by somebody else: `zip -0`, a download that was repaired."""
    out = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        for name in order or old.namelist():
            data = old.read(name)
            for was, becomes in (changes or {}).items():
                data = data.replace(was, becomes)
            info = zipfile.ZipInfo(name)
            if extra:
                info.extra = struct.pack("<HH", 0x4657, extra) + bytes(extra)
            new.writestr(info, data)
    return out.getvalue()


def three() -> dict[str, Tensor]:
    return {name: torch.full((8,), float(n)) for n, name in enumerate("abc")}


@pytest.mark.parametrize("how", ["plain", "padded", "reordered"])
def test_archives_of_another_making(how: str, file: Path) -> None:
    """Torch reads them by their directory; where a record lies is for the archive alone to say."""
    save(three(), file, True)
    names = zipfile.ZipFile(file).namelist()
    source = io.BytesIO(file.read_bytes())
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "padded": {"extra": 29},
        "reordered": {"order": sorted(names, reverse=True)},
    }
    file.write_bytes(rezipped(source, **options[how]))
    assert_as_loaded(file)


@pytest.mark.parametrize("how", ["plain", "padded", "reordered"])
def test_archives_without_format_version(how: str, file: Path) -> None:
    """The same from releases of torch (< 2.7) that did not write down how they lay out."""
    save(three(), file, True)
    names = [
        n for n in zipfile.ZipFile(file).namelist() if not n.endswith((".format_version", "nment"))
    ]
    source = io.BytesIO(file.read_bytes())
    options: dict[str, dict[str, Any]] = {
        "plain": {"order": names},
        "padded": {"order": names, "extra": 29},
        "reordered": {"order": sorted(names, reverse=True)},
    }
    file.write_bytes(rezipped(source, **options[how]))
    assert_as_loaded(file)


def test_bytes_before_the_archive(file: Path) -> None:
    """A self-extracting archive, as it were. Torch refuses it; here its records may be found."""
    save(three(), file, True)
    file.write_bytes(b"#!/bin/sh\n" + file.read_bytes())
    data = file.read_bytes()
    try:
        header = read_header(file)
    except FormatError:
        return
    assert {r.name: data[r.start : r.stop] for r in header.tensors} == {
        name: raw(tensor) for name, tensor in three().items()
    }


def test_record_that_is_there_twice(file: Path) -> None:
    """Which of the two counts, readers do not agree on: refused, or read as torch does."""
    save(three(), file, True)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("pytorch_model/data/1", bytes(32))
    try:
        read_header(file)
    except FormatError:
        return
    assert_as_loaded(file)


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(12.0).view(3, 4).T, torch.arange(12.0)[::2], torch.ones(1).expand(5)],
    ids=["transposed", "strided", "expanded"],
)
def test_not_contiguous(tensor: Tensor, file: Path, layout: bool) -> None:
    save({"sound": torch.ones(2), "it": tensor}, file, layout)
    with pytest.raises(Unsupported, match=r"tensor 'it' is stored transposed or strided") as error:
        read_header(file)
    assert str(file) in str(error.value)
    assert error.value.hint is not None


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"a": torch.ones(2), "step": 5}, "entry 'step' is a int"),
        ({"model": {"a": torch.ones(2)}}, "entry 'model' is a dict"),
        ({"a": None}, "entry 'a' is a NoneType"),
        ({5: torch.ones(2)}, "entry 5"),
    ],
)
def test_no_flat_state_dict(state: Any, says: str, file: Path, layout: bool) -> None:
    save(state, file, layout)
    with pytest.raises(FormatError, match=says):
        read_header(file)


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo the trap was sprung; exit 3",)


def test_code_is_not_run(file: Path, layout: bool, capfd: pytest.CaptureFixture[str]) -> None:
    save({"a": torch.ones(2), "b": Trap()}, file, layout)
    with pytest.raises(FormatError, match=r"loading it would run code: .*system"):
        read_header(file)
    assert capfd.readouterr().out == ""


ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negated": lambda: torch._neg_view(torch.ones(3)),
    "meta": lambda: torch.empty(3, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    "complex128": lambda: torch.ones(3, dtype=torch.complex128),
    "packed": lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_refused(what: str, layout: bool, file: Path) -> None:
    """Their elements are not simply the bytes of the file."""
    save({"a": torch.ones(2), "it": ODD[what]()}, file, layout)
    with pytest.raises(WeftError) as error:
        read_header(file)
    assert str(file) in str(error.value)


def test_legacy_views_of_storages(file: Path) -> None:
    """Torch before 0.4 saved a part of a storage as a view of it: refused, or the part is read."""

    def pickled(content: bytes) -> bytes:
        return b"\x80\x02" + content + b"."

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    view = b"(" + text("v") + b"K\x08K\x08t"
    stored = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x10"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + view + b"tQ"
    tensor += b"K\x00(K\x02K\x04t(K\x04K\x01t\x89ccollections\nOrderedDict\n)RtR"
    file.write_bytes(
        pickled(b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19")
        + pickled(b"M\xe9\x03")
        + pickled(b"}(" + text("little_endian") + b"\x88u")
        + pickled(b"}(" + text("a") + tensor + b"u")
        + pickled(b"](" + text("0") + b"e")
        + struct.pack("<q16f", 16, *range(16))
    )
    assert torch.load(file, weights_only=True)["a"].tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    try:
        read_header(file)
    except WeftError:
        return
    assert_as_loaded(file)


@pytest.mark.parametrize("keep", [0.001, 0.3, 0.6, 0.9, 0.999])
def test_truncated(keep: float, file: Path, layout: bool) -> None:
    save({"a": torch.randn(1000), "b": torch.randn(1000)}, file, layout)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(FormatError, match=r"is not a sound torch file|it is cut short"):
        read_header(file)


def test_missing(file: Path) -> None:
    with pytest.raises(NotFound):
        read_header(file)


def test_hash_is_of_the_description_alone(file: Path) -> None:
    hashes = []
    for state in ({"a": torch.zeros(3)}, {"a": torch.ones(3)}, {"b": torch.ones(3)}):
        save(state, file, True)
        hashes.append(read_header(file).source.header)
    assert hashes[0] == hashes[1] != hashes[2]


def test_hash_of_the_older_layout(file: Path) -> None:
    """Its keys are addresses of memory: no two files are alike, but one file is like itself."""
    save({"a": torch.zeros(3)}, file, False)
    before, data = read_header(file).source.header, file.read_bytes()
    file.write_bytes(data[:-1] + b"\x01")
    assert read_header(file).source.header == before
    file.write_bytes(data.replace(b"X\x01\x00\x00\x00a", b"X\x01\x00\x00\x00b"))
    assert read_header(file).source.header != before


# ------------------------------------------------------------------------------------------ random

EXAMPLES = int(os.environ.get("WEFT_FUZZ", "0"))
settings.register_profile(
    "weft-pickle",
    max_examples=EXAMPLES or 400,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@functools.cache  # torch writes addresses into the older layout: the size may differ each time
def files() -> list[bytes]:
    whole = torch.arange(20.0)
    found = []
    for layout in LAYOUTS.values():
        out = io.BytesIO()
        state = OrderedDict(a=torch.arange(12.0).view(3, 4), b=whole[3:8], c=whole[8:].view(3, 4))
        torch.save(state, out, _use_new_zipfile_serialization=layout)
        found.append(out.getvalue())
    return found


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A sound file with some bytes changed, left out or put in, most of them in the pickles."""
    data = bytearray(draw(st.sampled_from(files())))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(data), 700)) | st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "flip", "delete", "insert", "cut"])):
            case "flip" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "delete":
                del data[at : at + draw(st.integers(1, 8))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=4))
            case "cut":
                del data[at:]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@settings(settings.get_profile("weft-pickle"))
@given(mutated())
def test_mutated_files(file: Path, data: bytes) -> None:
    """Refused, or read as torch reads it; never another exception."""
    file.write_bytes(data)
    try:
        header = read_header(file)
    except WeftError:
        return
    try:
        loaded = torch.load(file, weights_only=True)
    except Exception:  # torch looks at more of the file than we need to, such as checksums
        return
    assert {ref.name for ref in header.tensors} == set(loaded)
    for ref in header.tensors:
        assert data[ref.start : ref.stop] == raw(loaded[ref.name])
