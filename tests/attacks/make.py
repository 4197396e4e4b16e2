"""Writes the corpus of broken and malicious files again.

    python tests/attacks/make.py

Every byte is put together here, without the libraries that the files are meant for: the result is
the same on every machine and with every release of them.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
# What the payloads do where they are run: they leave this file in the working directory.
CANARY = "the-payload-ran"


@dataclass(frozen=True)
class Case:
    """One broken model or adapter.

    Attributes:
        name: Path in the corpus: a file, or a folder.
        files: Path in the case (empty if the case is itself the file) -> content.
        says: A part of the error message.
        blames: A part of the path that the message names; by default the last part of `name`.
        adapter: Broken is the adapter and not the base.
    """

    name: str
    files: dict[str, bytes]
    says: str
    blames: str = ""
    adapter: bool = False

    @property
    def culprit(self) -> str:
        return self.blames or self.name.rpartition("/")[2]


# ------------------------------------------------------------------------------------- safetensors

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}


def header(content: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with the header `content`, of which it may claim another length."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensors(content: dict[str, Any], size: int | None = None) -> bytes:
    """A file with these entries, and with as many bytes of data as they (or `size`) say."""
    if size is None:
        size = max((e["data_offsets"][1] for e in content.values()), default=0)
    return header(json.dumps(content), bytes(range(size)))


def one(**fields: Any) -> bytes:
    """A sound tensor `a`, and a tensor `b` after it with `fields` that are not."""
    return tensors({"a": ONE, "b": TWO | fields}, 12)


def entries(text: str, size: int = 4) -> bytes:
    """A header spelt out, for what json.dumps does not write; `@` stands for a sound entry."""
    return header(text.replace("@", json.dumps(ONE)), bytes(range(size)))


def entry(stop: str, shape: str) -> str:
    """A header of one tensor, with numbers as they are spelt."""
    return f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{stop}]}}}}'


GOOD = tensors({"a": ONE, "b": TWO})

SAFETENSORS = {
    "empty-file": (b"", "0 bytes"),
    "truncated-in-length": (GOOD[:5], "a header length alone takes 8"),
    "truncated-after-length": (GOOD[:8], "its header claims"),
    "truncated-in-header": (GOOD[:40], "its header claims"),
    "truncated-before-data": (GOOD[:-12], "cut short"),
    "truncated-in-data": (GOOD[:-1], "cut short"),
    "length-one-too-many": (header("{}", length=3), "its header claims 3 bytes"),
    "length-1-gb": (header("{}", length=10**9), "at most 100,000,000"),
    "length-2-to-63": (header("{}", length=2**63), "at most 100,000,000"),
    "length-2-to-64": (header("{}", length=2**64 - 1), "at most 100,000,000"),
    "length-zero": (header("", b"{}"), "not JSON"),
    "length-cuts-json": (header('{"a":{}}', length=7), "not JSON"),
    "not-json": (header('{"a": oops}'), "not JSON"),
    "not-utf-8": (header(b'{"\xff":{}}'), "not JSON"),
    "utf-16": (header(json.dumps({"a": ONE}).encode("utf-16-le"), bytes(4)), "not JSON"),
    "byte-order-mark": (entries('\ufeff{"a":@}'), "not JSON"),
    "two-objects": (entries('{"a":@}{}'), "not JSON"),
    "comment": (entries('{"a":@} // yes'), "not JSON"),
    "list": (header("[]"), "a JSON list"),
    "string": (header('"a"'), "a JSON str"),
    "null": (header("null"), "a JSON NoneType"),
    "number": (header("1e999"), "a JSON float"),
    "nested-lists": (header("[" * 20_000), "not JSON"),
    "nested-objects": (header('{"a":' * 4_000), "not JSON"),
    "no-tensors": (header("{}"), "hold no tensors"),
    "no-tensors-but-metadata": (header('{"__metadata__":{"format":"pt"}}'), "hold no tensors"),
    "gap-instead-of-tensors": (header("{}", bytes(4)), "belong to no tensor"),
    "duplicate-tensor": (entries('{"a":@,"a":@}'), "key 'a' twice"),
    "duplicate-field": (
        entries('{"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,4]}}'),
        "key 'shape' twice",
    ),
    "duplicate-metadata": (
        entries('{"__metadata__":{"x":"1","x":"2"},"a":@}'),
        "key 'x' twice",
    ),
    "duplicate-by-escape": (entries('{"a":@,"\\u0061":@}'), "key 'a' twice"),
    "offsets-reversed": (one(data_offsets=[12, 4]), "run backwards"),
    "offsets-overlap": (one(data_offsets=[0, 8]), "overlaps the one before it"),
    "offsets-same": (
        tensors({"a": ONE, "b": ONE}),
        "overlaps the one before it",
    ),
    "offsets-leave-hole": (
        tensors({"a": ONE, "b": TWO | {"data_offsets": [8, 16]}}),
        "4 bytes before 'b' belong to no tensor",
    ),
    "offsets-leave-hole-at-start": (
        tensors({"a": ONE | {"data_offsets": [1, 5]}}),
        "1 bytes before 'a' belong to no tensor",
    ),
    "offsets-beyond-end": (one(data_offsets=[8, 16]), "cut short"),
    "offsets-2-to-63": (one(data_offsets=[2**63, 2**63 + 8]), "cut short"),
    "offsets-negative": (one(data_offsets=[-8, 0]), "run backwards"),
    "offsets-wrap-around": (one(data_offsets=[4, -(2**64) + 12]), "run backwards"),
    "offsets-floats": (one(data_offsets=[4.0, 12.0]), "are not two integers"),
    "offsets-bools": (one(data_offsets=[False, True]), "are not two integers"),
    "offsets-strings": (one(data_offsets=["4", "12"]), "are not two integers"),
    "offsets-three": (one(data_offsets=[4, 8, 12]), "are not two integers"),
    "offsets-none": (one(data_offsets=None), "are not two integers"),
    "offsets-4300-digits": (entries(entry("9" * 4300, "[1]")), "tensor 'a'"),
    "shape-too-small": (one(shape=[1]), "takes 4 bytes and the offsets give 8"),
    "shape-too-large": (one(shape=[3]), "takes 12 bytes and the offsets give 8"),
    "shape-negative": (one(shape=[-2]), "non-negative integers"),
    "shape-negative-twice": (one(shape=[-1, -2]), "non-negative integers"),
    "shape-floats": (one(shape=[2.0]), "non-negative integers"),
    "shape-bools": (one(shape=[True, True]), "non-negative integers"),
    "shape-strings": (one(shape=["2"]), "non-negative integers"),
    "shape-number": (one(shape=2), "non-negative integers"),
    "shape-none": (one(shape=None), "non-negative integers"),
    "shape-nested": (one(shape=[[2]]), "non-negative integers"),
    # 2³² · 2³² · 4 is 0 in 64 bits, and 2⁶² + 2 elements of 4 bytes are 8.
    "shape-overflows-to-zero": (
        one(shape=[2**32, 2**32], data_offsets=[4, 4]),
        "tensor 'b'",
    ),
    "shape-overflows-to-right-size": (one(shape=[2**62 + 2]), "tensor 'b'"),
    "shape-overflows-before-zero": (
        tensors({"a": ONE, "b": TWO | {"shape": [2**62, 2**62, 0], "data_offsets": [4, 4]}}),
        "tensor 'b'",
    ),
    "shape-2-to-64-and-zero": (
        tensors({"a": ONE, "b": TWO | {"shape": [2**64, 0], "data_offsets": [4, 4]}}),
        "tensor 'b'",
    ),
    "shape-product-8000-digits": (
        entries(entry("4", "[{0},{0}]".format("9" * 4000))),
        "tensor 'a'",
    ),
    "dtype-unknown": (one(dtype="F128"), "unknown dtype 'F128'"),
    "dtype-lower-case": (one(dtype="f32"), "unknown dtype 'f32'"),
    "dtype-half-a-byte": (one(dtype="F4", shape=[16]), "unknown dtype 'F4'"),
    "dtype-number": (one(dtype=32), "unknown dtype '32'"),
    "dtype-list": (one(dtype=["F32"]), "unknown dtype"),
    "dtype-none": (one(dtype=None), "unknown dtype 'None'"),
    "field-unknown": (one(code="print(1)"), "not {dtype, shape, data_offsets}"),
    "field-missing": (entries('{"a":{"dtype":"F32","shape":[1]}}'), "not {dtype, shape"),
    "entry-list": (entries('{"a":["F32",[1],[0,4]]}'), "not {dtype, shape, data_offsets}"),
    "entry-null": (entries('{"a":null}'), "not {dtype, shape, data_offsets}"),
    "metadata-number": (entries('{"__metadata__":{"x":1},"a":@}'), "mapping of strings"),
    "metadata-nested": (entries('{"__metadata__":{"x":{}},"a":@}'), "mapping of strings"),
    "metadata-list": (entries('{"__metadata__":["x"],"a":@}'), "mapping of strings"),
    "metadata-empty-list": (entries('{"__metadata__":[],"a":@}'), "mapping of strings"),
    "metadata-false": (entries('{"__metadata__":false,"a":@}'), "mapping of strings"),
    "metadata-zero": (entries('{"__metadata__":0,"a":@}'), "mapping of strings"),
    "trailing-bytes": (GOOD + b"\0", "1 bytes at the end belong to no tensor"),
    "trailing-zip": (GOOD + b"PK\5\6" + bytes(18), "22 bytes at the end belong to no tensor"),
    # Names that are not text: half of a surrogate pair can be written to no file and no terminal.
    "name-half-surrogate": (entries('{"\\ud800":@}'), "is not a sound safetensors file"),
    "metadata-half-surrogate": (
        entries('{"__metadata__":{"x":"\\udfff"},"a":@}'),
        "is not a sound safetensors file",
    ),
    # What a terminal would obey, if it were printed as it is.
    "escapes-in-name": (
        entries('{"\\u001b[2J\\nerror: none":{"dtype":"?","shape":[1],"data_offsets":[0,4]}}'),
        "unknown dtype",
    ),
    "escapes-in-dtype": (one(dtype="\u001b[2J\nerror: none"), "unknown dtype"),
    "escapes-in-shape": (one(shape="\u001b[2J\nerror: none"), "non-negative integers"),
    "escapes-in-offsets": (one(data_offsets="\u001b[2J\nerror: none"), "are not two integers"),
    "escapes-in-duplicate": (entries('{"\\u001b[2J":1,"\\u001b[2J":2}'), "twice"),
}


# ------------------------------------------------------------------------------------ index, config

SHARDS = {"one.safetensors": tensors({"a": ONE}), "two.safetensors": tensors({"b": ONE})}
INDEX = "model.safetensors.index.json"


def index(weight_map: Any) -> dict[str, bytes]:
    return {INDEX: json.dumps({"weight_map": weight_map}).encode(), **SHARDS}


def shard(name: Any) -> dict[str, bytes]:
    """An index that says of a tensor that it is in `name`."""
    return index({"a": "one.safetensors", "b": name})


INDEXES = {
    "not-json": ({INDEX: b"{", **SHARDS}, "is not JSON"),
    "not-utf-8": ({INDEX: b'{"weight_map":{"\xff":"one.safetensors"}}', **SHARDS}, "is not JSON"),
    "list": ({INDEX: b"[]", **SHARDS}, "a JSON list"),
    "nested": ({INDEX: b"[" * 5000, **SHARDS}, "is not JSON"),
    "no-weight-map": ({INDEX: b'{"metadata":{}}', **SHARDS}, "no weight_map"),
    "weight-map-list": (index([["a", "one.safetensors"]]), "no weight_map"),
    "weight-map-string": (index("one.safetensors"), "no weight_map"),
    "weight-map-empty": (index({}), "no weight_map"),
    "path-parent": (shard("../good/base/model.safetensors"), "not a file name"),
    "path-absolute": (shard("/etc/passwd"), "not a file name"),
    "path-below": (shard("deeper/two.safetensors"), "not a file name"),
    "path-dot-slash": (shard("./two.safetensors"), "not a file name"),
    "path-dots": (shard(".."), ".."),
    "path-dot": (shard("."), "not a file name"),
    "path-empty": (shard(""), "'b'"),
    "path-backslash": (shard("..\\two.safetensors"), "not a file name"),
    "path-nul": (shard("two.safetensors\0.txt"), "not a file name"),
    "path-too-long": (shard("x" * 300 + ".safetensors"), "'b'"),
    "path-half-surrogate": (shard("\ud800.safetensors"), "'b'"),
    "path-number": (shard(2), "not a file name"),
    "path-null": (shard(None), "not a file name"),
    "path-list": (shard(["two.safetensors"]), "not a file name"),
    "shard-missing": (shard("three.safetensors"), "lacks three.safetensors"),
    "shard-is-not-weights": (shard(INDEX), "is not a sound torch file"),
    "tensor-missing": (
        index({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}),
        "says that 'c' is in two.safetensors",
    ),
    "tensor-elsewhere": (index({"a": "two.safetensors"}), "says that 'a' is in two.safetensors"),
    "tensor-twice": (
        {
            INDEX: b'{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}',
            "one.safetensors": tensors({"a": ONE, "c": TWO}),
            "two.safetensors": tensors({"b": ONE, "c": TWO}),
        },
        "tensor 'c' is in one.safetensors and in two.safetensors",
    ),
    "shard-broken": (
        {**index({"a": "one.safetensors", "b": "two.safetensors"}), "two.safetensors": GOOD[:9]},
        "two.safetensors is not a sound safetensors file",
    ),
}
# A base of which only the config is broken.
CONFIGS = {
    "not-json": (b"{'model_type': 'llama'}", "is not JSON"),
    "not-utf-8": (b'{"model_type":"\xff"}', "is not JSON"),
    "list": (b"[]", "a JSON list"),
    "null": (b"null", "a JSON NoneType"),
    "nested": (b'{"a":' * 5000, "is not JSON"),
    "cut": (b'{"model_type": "llama", ', "is not JSON"),
    "empty": (b"", "is not JSON"),
}


# ---------------------------------------------------------------------------------------- adapters

MODULE = "base_model.model.layer"
LAYER = {  # rank 2, in 4, out 4
    f"{MODULE}.lora_A.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    f"{MODULE}.lora_B.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [32, 64]},
}
FLOATS = struct.pack("<16f", *(n / 16 for n in range(1, 17)))
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "example/base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["layer"],
}
BASE = {
    "layer.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]},
    "norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [64, 80]},
}
BASE_CONFIG = {"architectures": ["ExampleModel"], "model_type": "example", "hidden_size": 4}
WEIGHTS = header(json.dumps(LAYER), FLOATS)
GOOD_BASE = header(json.dumps(BASE), struct.pack("<20f", *(1 + n / 8 for n in range(20))))


def config(**fields: Any) -> dict[str, bytes]:
    """A sound adapter but for `fields` of its config."""
    return adapter(json.dumps(CONFIG | fields).encode())


def adapter(content: bytes, weights: bytes = WEIGHTS) -> dict[str, bytes]:
    return {"adapter_config.json": content, "adapter_model.safetensors": weights}


def raw(field: str, value: str) -> dict[str, bytes]:
    """The config with `value` spelt out, for what json.dumps does not write."""
    text = json.dumps(CONFIG | {field: "@"})
    return adapter(text.replace('"@"', value).encode())


ADAPTERS = {
    "config-not-json": (adapter(b"peft_type: LORA"), "is not JSON"),
    "config-not-utf-8": (adapter(b'{"peft_type": "\xff"}'), "is not JSON"),
    "config-list": (adapter(b"[]"), "a JSON list"),
    "config-string": (adapter(b'"LORA"'), "a JSON str"),
    "config-empty": (adapter(b""), "is not JSON"),
    "config-nested": (adapter(b"[" * 5000), "is not JSON"),
    "config-number-with-5000-digits": (raw("r", "1" * 5000), "is not JSON"),
    "no-peft-type": (adapter(b'{"r": 2, "lora_alpha": 4}'), "names no peft_type"),
    "peft-type-number": (config(peft_type=1), "names no peft_type"),
    "peft-type-list": (config(peft_type=["LORA"]), "names no peft_type"),
    "peft-type-escapes": (config(peft_type="\u001b[2J\nerror: none"), "adapter; this release"),
    "r-string": (config(r="2"), "r = '2'"),
    "r-null": (config(r=None), "r = None"),
    "r-list": (config(r=[2]), "r = [2]"),
    "r-float": (config(r=2.5), "says r = 2.5"),
    "r-other": (config(r=4), "says r = 4"),
    "alpha-missing": (
        adapter(json.dumps({k: v for k, v in CONFIG.items() if k != "lora_alpha"}).encode()),
        "lora_alpha",
    ),
    "alpha-null": (config(lora_alpha=None), "lora_alpha = None"),
    "alpha-string": (config(lora_alpha="4"), "lora_alpha = '4'"),
    "alpha-list": (config(lora_alpha=[4]), "lora_alpha = [4]"),
    "alpha-bool": (config(lora_alpha=True), "lora_alpha = True"),
    "alpha-nan": (raw("lora_alpha", "NaN"), "lora_alpha = nan"),
    "alpha-infinity": (raw("lora_alpha", "Infinity"), "lora_alpha = inf"),
    "alpha-1e999": (raw("lora_alpha", "1e999"), "lora_alpha = inf"),
    "alpha-400-digits": (raw("lora_alpha", "1" * 400), "lora_alpha"),
    "alpha-pattern-list": (config(alpha_pattern=["layer"]), "alpha_pattern"),
    "alpha-pattern-null-value": (config(alpha_pattern={"layer": None}), "alpha_pattern"),
    "alpha-pattern-list-values": (
        config(alpha_pattern={"layer": 4, "lay.*": [4]}),
        "alpha_pattern",
    ),
    "alpha-pattern-bad-regex": (config(alpha_pattern={"(layer": 8}), "alpha_pattern"),
    "rank-pattern-list": (config(rank_pattern=["layer"]), "rank_pattern"),
    "rank-pattern-string-value": (config(rank_pattern={"layer": "2"}), "rank_pattern"),
    "rank-pattern-bad-regex": (config(rank_pattern={"[layer": 8}), "rank_pattern"),
    "modules-to-save-string": (config(modules_to_save="layer"), "modules_to_save"),
    "modules-to-save-number": (
        adapter(
            json.dumps(CONFIG | {"modules_to_save": 1}).encode(),
            header(json.dumps({"base_model.model.norm.weight": ONE | {"shape": [1]}}), FLOATS[:4]),
        ),
        "modules_to_save",
    ),
    "modules-to-save-numbers": (
        adapter(
            json.dumps(CONFIG | {"modules_to_save": [1]}).encode(),
            header(json.dumps({"base_model.model.norm.weight": ONE | {"shape": [1]}}), FLOATS[:4]),
        ),
        "modules_to_save",
    ),
    "rslora-string": (config(use_rslora="false"), "use_rslora"),
    "dora-string": (config(use_dora="false"), "use_dora"),
    "variant-unknown": (config(use_something_new=True), "sets use_something_new"),
    "weights-not-safetensors": (adapter(json.dumps(CONFIG).encode(), b"<html>404"), "its header"),
    "weights-empty": (adapter(json.dumps(CONFIG).encode(), b""), "0 bytes"),
    "weights-cut": (adapter(json.dumps(CONFIG).encode(), WEIGHTS[:-1]), "cut short"),
    "weights-without-tensors": (adapter(json.dumps(CONFIG).encode(), header("{}")), "no tensors"),
    "weights-missing": ({"adapter_config.json": json.dumps(CONFIG).encode()}, "and no adapter_"),
}


# ------------------------------------------------------------------- pickles, opcode by opcode

MARK, STOP, REDUCE, FALSE = b"(", b".", b"R", b"\x89"


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def several(*items: bytes) -> bytes:
    """A tuple."""
    return MARK + b"".join(items) + b"t"


def listed(*items: bytes) -> bytes:
    return b"]" + MARK + b"".join(items) + b"e"


def mapping(items: dict[str, bytes]) -> bytes:
    return b"}" + MARK + b"".join(text(key) + value for key, value in items.items()) + b"u"


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return glob(module, name) + several(*arguments) + REDUCE


def storage(key: str, numel: int, kind: str = "FloatStorage", *more: bytes) -> bytes:
    """A storage by reference; `more` is what the older layout has behind it."""
    parts = (text("storage"), glob("torch", kind), text(key), text("cpu"), number(numel), *more)
    return several(*parts) + b"Q"


def tensor(
    stored: bytes, shape: tuple[int, ...], stride: tuple[int, ...] | None = None, offset: int = 0
) -> bytes:
    """A tensor as torch.save writes it."""
    steps = stride
    if steps is None:
        steps = tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        stored,
        number(offset),
        several(*map(number, shape)),
        several(*map(number, steps)),
        FALSE,
        call("collections", "OrderedDict"),
    )


def pickled(content: bytes) -> bytes:
    return b"\x80\x02" + content + STOP


def archive(
    records: dict[str, bytes], *, deflate: str = "", order: tuple[str, ...] | None = None
) -> bytes:
    """A zip archive as torch.save writes it; the record `deflate` is compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name in order or tuple(records):
            info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.compress_type = zipfile.ZIP_DEFLATED if name == deflate else zipfile.ZIP_STORED
            file.writestr(info, records[name])
    return out.getvalue()


def torch_zip(state: bytes, data: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """A `.bin` file in the layout of torch ≥ 1.6 that holds the pickle `state`."""
    records = {"data.pkl": pickled(state), "byteorder": b"little", "version": b"3\n"}
    records |= {f"data/{key}": value for key, value in (data or {"0": FLOATS}).items()}
    return archive(records, **options)


def torch_legacy(
    state: bytes, data: dict[str, bytes] | None = None, *, keys: bytes = b"", magic: bytes = b""
) -> bytes:
    """A `.bin` file in the layout before torch 1.6; each storage is of float32."""
    stored = {"0": FLOATS} if data is None else data
    parts = [
        magic or pickled(b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"),
        pickled(number(1001)),
        pickled(mapping({"protocol_version": number(1001), "little_endian": b"\x88"})),
        pickled(state),
        keys or pickled(listed(*map(text, stored))),
    ]
    parts += [struct.pack("<q", len(value) // 4) + value for value in stored.values()]
    return b"".join(parts)


WHOLE = tensor(storage("0", 16), (4, 4))
OLD = tensor(storage("0", 16, "FloatStorage", b"N"), (4, 4))  # b"N": no view of another storage
PAYLOAD = call("posix", "system", text(f"touch {CANARY}"))
EVAL = call("builtins", "eval", text(f"open({CANARY!r}, 'w')"))
RUNS_CODE = "loading it would run code"
UNSOUND = "is not a sound torch file"

PICKLES = {
    "empty-file": (b"", UNSOUND),
    "html": (b"<html>404</html>", UNSOUND),
    "system-zip": (torch_zip(PAYLOAD), RUNS_CODE),
    "system-legacy": (torch_legacy(PAYLOAD), RUNS_CODE),
    "system-beside-tensor-zip": (
        torch_zip(mapping({"layer.weight": WHOLE, "x": PAYLOAD})),
        RUNS_CODE,
    ),
    "system-beside-tensor-legacy": (
        torch_legacy(mapping({"layer.weight": OLD, "x": PAYLOAD})),
        RUNS_CODE,
    ),
    # Run, and thrown away before the state dict: it leaves nothing behind to be seen.
    "system-then-popped-zip": (
        torch_zip(PAYLOAD + b"0" + mapping({"layer.weight": WHOLE})),
        RUNS_CODE,
    ),
    "system-as-storage-type": (
        torch_legacy(mapping({"a": tensor(storage("0", 16, "FloatStorage", PAYLOAD), (4, 4))})),
        RUNS_CODE,
    ),
    "system-as-keys-legacy": (
        torch_legacy(mapping({"layer.weight": OLD}), keys=pickled(PAYLOAD)),
        RUNS_CODE,
    ),
    "system-as-magic-legacy": (torch_legacy(PAYLOAD, magic=pickled(PAYLOAD)), RUNS_CODE),
    "system-plain-pickle": (pickled(PAYLOAD), UNSOUND),
    "eval-zip": (torch_zip(EVAL), RUNS_CODE),
    "eval-by-stack-global": (
        torch_zip(text("builtins") + text("eval") + b"\x93" + several(text("1")) + REDUCE),
        RUNS_CODE,
    ),
    "getattr-zip": (torch_zip(call("builtins", "getattr", text("a"), text("b"))), RUNS_CODE),
    "zip-cut-in-half": (torch_zip(mapping({"layer.weight": WHOLE}))[:300], UNSOUND),
    "zip-without-end": (torch_zip(mapping({"layer.weight": WHOLE}))[:-4], UNSOUND),
    "zip-without-start": (torch_zip(mapping({"layer.weight": WHOLE}))[100:], UNSOUND),
    "zip-compressed-data": (
        torch_zip(mapping({"layer.weight": WHOLE}), deflate="data/0"),
        "archive/data/0 is compressed",
    ),
    "zip-compressed-pickle": (
        torch_zip(mapping({"layer.weight": WHOLE}), deflate="data.pkl"),
        "archive/data.pkl is compressed",
    ),
    "zip-big-endian": (
        archive(
            {"data.pkl": pickled(mapping({"a": WHOLE})), "byteorder": b"big", "data/0": FLOATS}
        ),
        "big-endian",
    ),
    "zip-without-pickle": (archive({"data/0": FLOATS}), "no data.pkl"),
    "zip-of-something": (archive({"word/document.xml": b"<xml/>"}), "no data.pkl"),
    "zip-without-storage": (torch_zip(mapping({"layer.weight": WHOLE}), {"1": FLOATS}), UNSOUND),
    "zip-short-storage": (torch_zip(mapping({"layer.weight": WHOLE}), {"0": FLOATS[:8]}), UNSOUND),
    "zip-short-pickle": (archive({"data.pkl": pickled(b"}")[:-1], "data/0": FLOATS}), UNSOUND),
    "legacy-cut-in-pickle": (torch_legacy(mapping({"layer.weight": OLD}))[:150], UNSOUND),
    "legacy-cut-in-data": (torch_legacy(mapping({"layer.weight": OLD}))[:-1], "cut short"),
    "legacy-without-data": (torch_legacy(mapping({"layer.weight": OLD}))[:-72], UNSOUND),
    "legacy-other-size": (
        torch_legacy(mapping({"layer.weight": OLD}), {"0": FLOATS[:60]}),
        "storage 0 has 15 elements, not 16",
    ),
    "legacy-unknown-key": (
        torch_legacy(mapping({"layer.weight": OLD}), {"1": FLOATS}),
        UNSOUND,
    ),
    "legacy-without-keys": (torch_legacy(mapping({"layer.weight": OLD}), {}), UNSOUND),
    "legacy-keys-number": (
        torch_legacy(mapping({"layer.weight": OLD}), keys=pickled(number(1))),
        UNSOUND,
    ),
    "legacy-negative-size": (
        torch_legacy(mapping({"a": tensor(storage("0", -16, "FloatStorage", b"N"), (4, 4))})),
        UNSOUND,
    ),
    "legacy-2-to-62-elements": (
        torch_legacy(mapping({"a": tensor(storage("0", 2**62, "FloatStorage", b"N"), (4, 4))})),
        UNSOUND,
    ),
    "stack-underflow-zip": (torch_zip(REDUCE), UNSOUND),
    "stack-underflow-legacy": (torch_legacy(REDUCE), UNSOUND),
    "memo-missing": (torch_zip(b"h\x07"), UNSOUND),
    "storage-is-number": (torch_zip(mapping({"a": number(1) + b"Q"})), UNSOUND),
    "storage-is-number-legacy": (torch_legacy(mapping({"a": number(1) + b"Q"})), UNSOUND),
    "storage-of-unknown-type": (
        torch_zip(mapping({"a": tensor(storage("0", 16, "load"), (4,))})),
        RUNS_CODE,
    ),
    "rebuild-with-too-few": (
        torch_zip(mapping({"a": call("torch._utils", "_rebuild_tensor_v2")})),
        UNSOUND,
    ),
    "pickle-long-string": (torch_zip(b"\x8d" + struct.pack("<Q", 2**62)), UNSOUND),
    "not-a-mapping-list": (torch_zip(listed(WHOLE)), "holds a list, not a mapping"),
    "not-a-mapping-tensor": (torch_zip(WHOLE), "holds a Tensor, not a mapping"),
    "not-a-mapping-legacy": (torch_legacy(listed(OLD)), "holds a list, not a mapping"),
    "value-is-number": (torch_zip(mapping({"epoch": number(3), "a": WHOLE})), "'epoch' is a int"),
    "value-is-number-legacy": (torch_legacy(mapping({"epoch": number(3)}), {}), "'epoch' is a int"),
    "value-is-nested": (torch_zip(mapping({"model": mapping({"a": WHOLE})})), "'model' is a dict"),
    "key-is-number": (torch_zip(b"}" + MARK + number(1) + WHOLE + b"u"), "entry 1"),
    "no-tensors-zip": (torch_zip(b"}"), "hold"),
    "no-tensors-legacy": (torch_legacy(b"}", {}), "hold"),
    "transposed-zip": (
        torch_zip(mapping({"a": tensor(storage("0", 16), (4, 4), (1, 4))})),
        "stored transposed or strided",
    ),
    "transposed-legacy": (
        torch_legacy(
            mapping({"a": tensor(storage("0", 16, "FloatStorage", b"N"), (4, 4), (1, 4))})
        ),
        "stored transposed or strided",
    ),
    "expanded": (
        torch_zip(mapping({"a": tensor(storage("0", 16), (1000, 1000), (0, 0))})),
        "stored transposed or strided",
    ),
    "larger-than-storage": (torch_zip(mapping({"a": tensor(storage("0", 16), (5, 4))})), UNSOUND),
    "offset-beyond-storage": (
        torch_zip(mapping({"a": tensor(storage("0", 16), (4, 4), offset=1)})),
        UNSOUND,
    ),
    "offset-negative": (
        torch_zip(mapping({"a": tensor(storage("0", 16), (2, 2), offset=-1)})),
        UNSOUND,
    ),
}


# ------------------------------------------------------------------------------------------- cases


def cases() -> list[Case]:
    """All that the corpus holds, but for the two that must work."""
    found = [
        Case(f"safetensors/{name}.safetensors", {"": data}, says)
        for name, (data, says) in SAFETENSORS.items()
    ]
    found += [Case(f"index/{name}", files, says) for name, (files, says) in INDEXES.items()]
    found += [
        Case(f"config/{name}", {"model.safetensors": GOOD_BASE, "config.json": data}, says)
        for name, (data, says) in CONFIGS.items()
    ]
    found += [
        Case(f"adapter/{name}", files, says, adapter=True)
        for name, (files, says) in ADAPTERS.items()
    ]
    found += [
        Case(f"pickle/{name}.bin", {"": data}, says) for name, (data, says) in PICKLES.items()
    ]
    for name in ("system-zip", "system-legacy"):
        files = {
            "adapter_config.json": json.dumps(CONFIG).encode(),
            "adapter_model.bin": PICKLES[name][0],
        }
        found.append(Case(f"adapter/{name}", files, RUNS_CODE, adapter=True))
        files = {"pytorch_model.bin": PICKLES[name][0]}
        found.append(Case(f"index/{name}", files, RUNS_CODE))
    return found


def large(folder: Path) -> list[Case]:
    """Cases too large to be kept: written into `folder` when they are wanted."""
    digits = "7" * 100_000
    found = {
        "digits-in-shape": (entry("1", f"[{digits}]"), "not JSON"),
        "digits-in-offsets": (entry(digits, "[1]"), "not JSON"),
        "digits-in-fraction": (entry("4", f"[1.{digits}]"), "non-negative integers"),
        "digits-in-exponent": (entry("4", f"[1e{digits}]"), "non-negative integers"),
        "nested-300000": ("[" * 300_000, "not JSON"),
        "spaces": (" " * 300_000, "not JSON"),
    }
    made = [
        Case(f"{name}.safetensors", {"": entries(text)}, says)
        for name, (text, says) in found.items()
    ]
    write(folder, made)
    return made


def write(folder: Path, made: list[Case]) -> None:
    for case in made:
        for name, data in case.files.items():
            path = folder / case.name / name if name else folder / case.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def write_good(folder: Path) -> None:
    """A base and an adapter that nothing is wrong with, in every format that is read."""
    base = json.dumps(BASE_CONFIG).encode()
    norm = tensor(storage("1", 4), (4,))
    old_norm = tensor(storage("1", 4, "FloatStorage", b"N"), (4,))
    data = {"0": GOOD_BASE[-80:-16], "1": GOOD_BASE[-16:]}
    files = {
        "base/model.safetensors": GOOD_BASE,
        "base/config.json": base,
        "zip/pytorch_model.bin": torch_zip(
            mapping({"layer.weight": WHOLE, "norm.weight": norm}), data
        ),
        "zip/config.json": base,
        "legacy/pytorch_model.bin": torch_legacy(
            mapping({"layer.weight": OLD, "norm.weight": old_norm}), data
        ),
        "legacy/config.json": base,
        "adapter/adapter_config.json": json.dumps(CONFIG).encode(),
        "adapter/adapter_model.safetensors": WEIGHTS,
    }
    for name, content in files.items():
        path = folder / "good" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def main() -> None:
    shutil.rmtree(CORPUS, ignore_errors=True)
    write_good(CORPUS)
    write(CORPUS, cases())
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    print(
        f"{len(cases())} cases, {len(files)} files, {sum(p.stat().st_size for p in files):,} bytes"
    )


if __name__ == "__main__":
    main()
