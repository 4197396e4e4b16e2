"""A folder or file with a base model -> `Checkpoint`: tensors, config, files beside them."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core.errors import FormatError, NotFound, Unsupported
from weft.core.names import nearest
from weft.core.specs import Checkpoint, Input, Source, TensorRef
from weft.core.units import clean
from weft.formats.identity import identify
from weft.formats.safetensors import Header
from weft.formats.safetensors import read_header as read_safetensors_header
from weft.formats.side_files import beside_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np

_RECIPE = re.compile(rb"^[\"']?(merge_method|finetune\w*)[\"']?\s*:", re.MULTILINE)
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}


def open_checkpoint(path: Path, given: str) -> Checkpoint:
    """Read every header of the checkpoint at `path`, a folder or a single file.

    Raises:
        NotFound: There is no checkpoint here, or a shard is missing.
        FormatError: A header, the index or the config is malformed, or they contradict each other.
        Unsupported: A format that is known and not read.
    """
    path = path.absolute()
    if path.is_file():
        _refuse_other_files(path)
        folder, files, weight_map = path.parent, [path.name], None
        alone = [f for f in folder.iterdir() if f.suffix in _WEIGHT_SUFFIXES] == [path]
    else:
        folder, alone = path, True
        files, weight_map = _find_weights(folder)
    headers = {file: read_header(folder / file) for file in files}
    sources = [header.source for header in headers.values()]
    tensors = _tensors(folder, headers, weight_map)
    _refuse_adapter(folder / files[0], tensors)
    kept, left = beside_model(folder, files) if alone else ([], [])
    config: dict[str, Any] = {}
    if "config.json" in kept:
        config, source = _read_config(folder / "config.json")
        sources.append(source)
    return Checkpoint(
        given=given,
        folder=str(folder),
        tensors=tensors,
        shards=tuple(files),
        metadata=headers[files[0]].metadata,
        config=config,
        side_files=tuple(kept),
        left_out=tuple(left),
        sources=tuple(sources),
    )


def _read_config(path: Path) -> tuple[dict[str, Any], Source]:
    """`config.json`; the fields that weft uses have the type that it expects."""
    config, source = read_json_source(path)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for field, form in _CONFIG_FORMS.items():
        for part in parts:
            if part.get(field) is not None and not isinstance(part[field], form):
                shown = clean(repr(part[field]))[:60]
                raise FormatError(f"{path}: {field} is {shown}, not a {form.__name__}", _CORRECT)
    architectures = config.get("architectures") or []
    if not all(isinstance(name, str) for name in architectures):
        raise FormatError(f"{path}: architectures is not a list of names", _CORRECT)
    return config, source


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint (an adapter's folder does not)."""
    return any((folder / name).is_file() for name in _INDEXES + _SINGLES)


_CONFIG_FORMS: dict[str, type] = {
    "architectures": list,
    "model_type": str,
    "quantization_config": dict,
    "vocab_size": int,
    "tie_word_embeddings": bool,
}
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
LOST_CONFIG = (
    "finish the download; or put the adapter_config.json of the training beside it, another "
    "checkpoint's being the same"
)


def _find_weights(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The shards of `folder` in order, and what its index says is in which."""
    if (folder / "weft-journal.jsonl").exists():
        raise FormatError(
            f"{folder} is what an interrupted run of weft left, not a model",
            "finish it: run the same command with --resume",
        )
    for index, single in zip(_INDEXES, _SINGLES, strict=True):
        if (folder / index).is_file():
            weight_map = _read_index(folder / index)
            return sorted(set(weight_map.values())), weight_map
        if (folder / single).is_file():
            return [single], None
    if (folder / "adapter_config.json").is_file():
        raise NotFound(
            f"{folder} is an adapter, not a base model", "give the model that it was trained on"
        )
    others = sorted(f.name for f in folder.glob("*.safetensors"))
    if any(folder.glob("adapter_model.*")):
        raise NotFound(
            f"{folder} holds an adapter without adapter_config.json, which says how to scale it",
            LOST_CONFIG,
        )
    if len(others) == 1:
        return others, None
    if others:
        raise NotFound(
            f"{folder} has {len(others)} .safetensors files and no model.safetensors.index.json",
            "shards need their index; or name the one file that is meant",
        )
    for pattern, what in (("*.gguf", "a GGUF file"), ("lit_model.pth", "a LitGPT checkpoint")):
        if any(folder.glob(pattern)):
            raise _unread(folder, f"holds {what}")
    raise NotFound(f"no model in {folder}: no .safetensors and no pytorch_model.bin")


def _refuse_other_files(path: Path) -> None:
    """A tokenizer or a config is not a torch file that is broken: it is something else."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    if head == b"GGUF":
        raise _unread(path, "is a GGUF file")
    if path.suffix in (".yml", ".yaml") and _RECIPE.search(path.read_bytes()):
        raise FormatError(
            f"{path} is a recipe, and no model",
            f"weft run {path} --check says whether it is sound, --dry-run what it makes",
        )
    torch = head == b"PK\3\4" or head[:1] == b"\x80"  # an archive, or a pickle
    if path.suffix not in _WEIGHT_SUFFIXES and not torch:
        raise FormatError(
            f"{path} is not weights: neither safetensors nor a file of torch",
            "give the model's folder, or a .safetensors, .bin, .pt or .pth file",
        )


def _unread(path: Path, what: str) -> Unsupported:
    return Unsupported(
        f"{path} {what}, which weft does not read yet",
        "give the Hugging Face checkpoint that it was made from",
    )


def _refuse_adapter(path: Path, tensors: Iterable[str]) -> None:
    """Factors under whatever file name: as a base they would be merged into, and make no model."""
    if all(name.startswith(("lora_", "lycoris_")) for name in tensors):  # Kohya's, LyCORIS's
        raise NotFound(
            f"{path} is adapter weights, not a base model", "give the model that it was trained on"
        )
    if not all("lora_" in name or name.startswith("base_model.model.") for name in tensors):
        return
    if (path.parent / "adapter_config.json").is_file():
        raise NotFound(
            f"{path} is adapter weights, not a base model", f"give its folder, {path.parent}"
        )
    raise NotFound(
        f"{path} is adapter weights, not a base model, and no adapter_config.json beside it says "
        "how to scale them",
        LOST_CONFIG,
    )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no weight_map", _CORRECT)
    for name, shard in weight_map.items():
        # A shard is a file beside the index; anything else could reach out of the folder.
        if not isinstance(shard, str) or not _is_file_name(shard):
            shown = repr(shard)[:80]
            raise FormatError(f"{path}: weight_map[{name!r}] is {shown}, not a file name", _CORRECT)
        if not (path.parent / shard).is_file():
            raise NotFound(
                f"{path.parent} lacks {shard}, which holds {name!r}", "finish the download"
            )
    return weight_map


def _is_file_name(name: str) -> bool:
    plain = Path(name).name == name and name.isprintable() and "\\" not in name
    return plain and len(name.encode(errors="replace")) < 256


def read_header(path: Path) -> Header:
    """The header of a weight file, by its content's format."""
    if path.suffix == ".safetensors":
        return read_safetensors_header(path)
    # torch is imported here and nowhere else on the way to `weft inspect` of safetensors.
    reader = importlib.import_module("weft.formats.torch_pickle")
    header = reader.read_header(path)
    assert isinstance(header, Header)
    return header


def _tensors(
    folder: Path, headers: dict[str, Header], weight_map: dict[str, str] | None
) -> dict[str, TensorRef]:
    """The tensors of all shards; the index decides where two have one of the same name."""
    tensors: dict[str, TensorRef] = {}
    for file, header in headers.items():
        for ref in header.tensors:
            home = weight_map.get(ref.name, file) if weight_map else file
            if home != file:
                continue  # the index says that another shard's copy is the one that counts
            if ref.name in tensors:
                other = Path(tensors[ref.name].file).name
                raise FormatError(
                    f"{folder}: tensor {ref.name!r} is in {other} and in {file}",
                    "move the file that does not belong to the model out of the folder",
                )
            tensors[ref.name] = ref
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            near = nearest(name, tensors)
            raise FormatError(
                f"{folder}: the index says that {name!r} is in {file}, and it is not",
                f"the nearest name there is {near[0]!r}" if near else None,
            )
    if not tensors:
        raise FormatError(f"{folder}: {', '.join(headers)} hold no tensors", _AGAIN)
    return tensors


_AGAIN = "save or download the model again"
_CORRECT = "correct it there, or save or download the file again"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`.

    Raises:
        FormatError: Not JSON, or not an object.
    """
    return read_json_source(path)[0]


def read_json_source(path: Path) -> tuple[dict[str, Any], Source]:
    """A JSON object from `path`, and which file that was.

    Raises:
        FormatError: Not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            identity, raw = identify(file), file.read()
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {_what_is_wrong(error)}", _CORRECT) from None
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(content, dict):
        what = f"{path} is a JSON {type(content).__name__}, not an object"
        raise FormatError(what, _CORRECT)
    return content, Source(str(path.absolute()), hashlib.sha256(raw).hexdigest(), identity)


def _what_is_wrong(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        if not error.doc.strip():
            return "it is empty"
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return str(error)[:100]


def describe_input(role: str, source: Source) -> Input:
    """What the manifest says of a file that was read, and what tells later that it has changed.

    Raises:
        FormatError: An adapter's file is another one by now.
    """
    path, identity = Path(source.path), source.identity
    if path.suffix not in _WEIGHT_SUFFIXES:
        return Input(role, source.path, identity.size, None, source.header, identity)
    # A base is too large to be hashed. Of an adapter the header is not enough: two checkpoints of
    # one training differ in nothing else.
    content = None if role == "base" else _digest(source)
    return Input(role, source.path, identity.size, source.header, content, identity)


def describe_copied(role: str, path: Path) -> Input:
    """The same of a file that is copied, whatever is in it.

    (sentence-transformers has weights among such.)
    """
    try:
        with path.open("rb") as file:
            identity = identify(file)
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    return Input(role, str(path.absolute()), identity.size, None, content, identity)


def _digest(source: Source) -> str:
    try:
        with Path(source.path).open("rb") as file:
            if identify(file) == source.identity:
                return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"cannot read {source.path}: {error.strerror}") from None
    raise FormatError(
        f"{source.path} changed while it was being read", "run the same command again"
    )


def same_bytes(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors are equal to the bit.

    The one look at data that comes before a plan: only where an adapter saved a tensor twice, and
    it decides what the output's tensors are.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if (one.file, one.start) == (other.file, other.start):
        return True
    return all(mine == yours for mine, yours in zip(_blocks(one), _blocks(other), strict=True))


def _blocks(ref: TensorRef, size: int = 2**22) -> Iterator[bytes]:
    """The tensor's bytes, a few at a time."""
    with Path(ref.file).open("rb") as file:
        file.seek(ref.start)
        for start in range(0, ref.nbytes, size):
            data = file.read(min(size, ref.nbytes - start))
            if not data:
                raise FormatError(
                    f"{ref.file} became shorter while it was being read",
                    "run the same command again",
                )
            yield data


def bits(ref: TensorRef) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]:
    """The values of a small tensor as they lie, whatever they mean: whole numbers of their size."""
    import numpy as np

    width = np.dtype(f"u{ref.nbytes // max(ref.numel, 1)}")
    return np.fromfile(ref.file, width, ref.numel, offset=ref.start).reshape(ref.shape)


def same_values(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors are equal in value, perhaps saved in different dtypes."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= set(_WIDTHS):
        return False
    if one.dtype == other.dtype:
        return same_bytes(one, other)
    import numpy as np

    step = 2**20
    return all(
        np.array_equal(_widened(one, start, step), _widened(other, start, step), equal_nan=True)
        for start in range(0, one.numel, step)
    )


_WIDTHS = {"bfloat16": "u2", "float16": "f2", "float32": "f4", "float64": "f8"}


def _widened(ref: TensorRef, start: int, count: int) -> np.ndarray[Any, Any]:
    """Elements from `start` on, in float64."""
    import numpy as np

    width = np.dtype(_WIDTHS[ref.dtype]).newbyteorder("<")
    count = min(count, ref.numel - start)
    raw = np.fromfile(ref.file, width, count, offset=ref.start + start * width.itemsize)
    if ref.dtype == "bfloat16":
        raw = (raw.astype("u4") << 16).view("f4")
    return raw.astype("f8")
