"""Base models as they lie on disk: in one file or many, in either format, with what is beside."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from weft.core.errors import FormatError, NotFound, Unsupported
from weft.core.specs import TensorRef
from weft.formats.checkpoint import (
    bits,
    describe_copied,
    describe_input,
    has_weights,
    open_checkpoint,
    read_json,
    same_bytes,
)
from weft.formats.identity import identify

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from weft.core.specs import Checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16}


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    layers = {f"model.layers.{n}.self_attn.q_proj.weight": torch.randn(8, 8) for n in range(3)}
    return {
        "model.embed_tokens.weight": torch.randn(16, 8),
        **layers,
        "model.norm.weight": torch.ones(8),
        "lm_head.weight": torch.randn(16, 8),
    }


def as_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def save_bin(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path)


def save_old_bin(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def whole(folder: Path, name: str, save: Callable[[dict[str, Tensor], Path], None]) -> Path:
    folder.mkdir()
    save(weights(), folder / name)
    as_json(folder / "config.json", CONFIG)
    return folder


def sharded(
    folder: Path, stem: str, suffix: str, save: Callable[[dict[str, Tensor], Path], None]
) -> Path:
    folder.mkdir()
    tensors = weights()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:2], names[2:4], names[4:]), 1):
        file = f"{stem}-{number:05}-of-00003.{suffix}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    as_json(folder / f"{stem}.{suffix}.index.json", {"weight_map": weight_map})
    as_json(folder / "config.json", CONFIG)
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda f: whole(f, "model.safetensors", save_file),
    "safetensors-by-another-name": lambda f: whole(f, "weights.safetensors", save_file),
    "safetensors-shards": lambda f: sharded(f, "model", "safetensors", save_file),
    "bin": lambda f: whole(f, "pytorch_model.bin", save_bin),
    "bin-legacy": lambda f: whole(f, "pytorch_model.bin", save_old_bin),
    "bin-shards": lambda f: sharded(f, "pytorch_model", "bin", save_bin),
    "bin-legacy-shards": lambda f: sharded(f, "pytorch_model", "bin", save_old_bin),
    "file": lambda f: whole(f, "model.safetensors", save_file) / "model.safetensors",
    "file-bin": lambda f: whole(f, "anything.pt", save_bin) / "anything.pt",
}


def load(found: Checkpoint) -> dict[str, Tensor]:
    """What the byte ranges hold."""
    loaded = {}
    for name, ref in found.tensors.items():
        data = bytearray(Path(ref.file).read_bytes()[ref.start : ref.stop])
        loaded[name] = torch.frombuffer(data, dtype=getattr(torch, ref.dtype)).view(ref.shape)
    return loaded


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path / "base")
    found = open_checkpoint(path, "given")
    assert_equal(load(found), weights())
    assert found.given == "given"
    assert found.folder == str(tmp_path / "base")
    assert found.config == CONFIG
    assert found.side_files == ("config.json",)
    assert found.left_out == ()
    assert len(found.shards) == (3 if "shards" in layout else 1)
    assert list(found.shards) == sorted(found.shards)
    assert found.nbytes == sum(4 * tensor.numel() for tensor in weights().values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_merges(layout: str, tmp_path: Path) -> None:
    """The output is safetensors, with an index where there are several, and the same everywhere."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    key = "base_model.model.model.layers.1.self_attn.q_proj"
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    save_file(
        {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B},
        adapter / "adapter_model.safetensors",
    )
    as_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    out = tmp_path / "out"
    weft.merge(LAYOUTS[layout](tmp_path / "base"), adapter, output=out)
    merged: dict[str, Tensor] = {}
    files = sorted(out.glob("*.safetensors"))
    for file in files:
        merged |= load_file(file)
    expected = weights()
    expected["model.layers.1.self_attn.q_proj.weight"] += B @ A
    assert_equal(merged, expected)
    assert not list(out.glob("*.bin"))
    index = out / "model.safetensors.index.json"
    if "shards" in layout:
        assert [f.name for f in files] == [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    if [f.name for f in files] == ["model.safetensors"]:
        assert not index.exists()
    else:
        found = json.loads(index.read_text())
        assert found["weight_map"] == {
            name: file.name for file in files for name in load_file(file)
        }
        assert found["metadata"]["total_size"] == sum(4 * t.numel() for t in merged.values())
    assert_equal(load(open_checkpoint(out, "out")), expected)


def test_order_is_that_of_the_shards_and_bytes(tmp_path: Path) -> None:
    found = open_checkpoint(LAYOUTS["safetensors-shards"](tmp_path / "base"), "given")
    places = [(Path(ref.file).name, ref.start) for ref in found.tensors.values()]
    assert places == sorted(places)
    assert len(places) == 6


# -------------------------------------------------------------------------------- what is preferred


def test_safetensors_before_bin(tmp_path: Path) -> None:
    """A repository often has both; the pickle is the one not to read."""
    folder = LAYOUTS["safetensors"](tmp_path / "base")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    found = open_checkpoint(folder, "given")
    assert found.shards == ("model.safetensors",)
    assert found.left_out == ("pytorch_model.bin",)


def test_index_before_a_single_file(tmp_path: Path) -> None:
    folder = LAYOUTS["safetensors-shards"](tmp_path / "base")
    save_file({"other": torch.ones(1)}, folder / "model.safetensors")
    found = open_checkpoint(folder, "given")
    assert "other" not in found.tensors
    assert found.left_out == ("model.safetensors",)


def test_the_index_decides_between_copies(tmp_path: Path) -> None:
    """A tied tensor that two shards hold: that of the index counts."""
    one, two = "one.safetensors", "two.safetensors"
    save_file({"a": torch.zeros(1), "tied": torch.full((1,), 1.0)}, tmp_path / one)
    save_file({"b": torch.zeros(1), "tied": torch.full((1,), 2.0)}, tmp_path / two)
    index = tmp_path / "model.safetensors.index.json"
    for home, value in ((one, 1.0), (two, 2.0)):
        as_json(index, {"weight_map": {"a": one, "b": two, "tied": home}})
        assert load(open_checkpoint(tmp_path, "given"))["tied"].tolist() == [value]


def test_a_tensor_that_the_index_forgot(tmp_path: Path) -> None:
    folder = LAYOUTS["safetensors-shards"](tmp_path / "base")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    as_json(index, {"weight_map": weight_map})
    assert_equal(load(open_checkpoint(folder, "given")), weights())


def test_metadata_of_the_first_shard(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors", {"format": "pt", "n": "1"})
    save_file({"b": torch.ones(1)}, tmp_path / "2.safetensors", {"n": "2"})
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"}
    as_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    assert open_checkpoint(tmp_path, "given").metadata == {"format": "pt", "n": "1"}


def test_file_among_others(tmp_path: Path) -> None:
    """Where several weight files lie together, the config may be of any of them."""
    folder = LAYOUTS["safetensors"](tmp_path / "base")
    save_file({"other": torch.ones(1)}, folder / "other.safetensors")
    found = open_checkpoint(folder / "other.safetensors", "given")
    assert list(found.tensors) == ["other"]
    assert (found.config, found.side_files, found.left_out) == ({}, (), ())


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LAYOUTS["safetensors"](tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    found = open_checkpoint(Path("base"), "base")
    assert found.folder == str(tmp_path / "base")
    assert all(Path(ref.file).is_absolute() for ref in found.tensors.values())


# ------------------------------------------------------------------------------------ no checkpoint


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NotFound, match="no model in"):
            open_checkpoint(path, "given")


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    as_json(tmp_path / "adapter_config.json", {})
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(NotFound, match="is an adapter, not a base model"):
        open_checkpoint(tmp_path, "given")
    assert not has_weights(tmp_path)


def test_an_adapter_without_config_is_no_base(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(NotFound, match=r"adapter_config\.json"):
        open_checkpoint(tmp_path, "given")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "x.safetensors", "adapter.bin"])
@pytest.mark.parametrize("key", ["base_model.model.a.lora_A.weight", "a.lora_up.weight"])
def test_a_file_of_adapter_weights_is_no_base(key: str, name: str, tmp_path: Path) -> None:
    """Whatever it is called: merging into factors would make a file that is nothing."""
    save = save_bin if name.endswith(".bin") else save_file
    save({key: torch.ones(1)}, tmp_path / name)
    with pytest.raises(NotFound, match=rf"{name} is adapter weights, not a base") as error:
        open_checkpoint(tmp_path / name, "given")
    assert "no adapter_config.json beside it" in str(error.value)
    as_json(tmp_path / "adapter_config.json", {})
    with pytest.raises(NotFound, match=rf"{name} is adapter weights, not a base") as error:
        open_checkpoint(tmp_path / name, "given")
    assert error.value.hint == f"give its folder, {tmp_path}"


def test_a_base_with_factors_of_its_own(tmp_path: Path) -> None:
    """Some architectures have low-rank parts; a checkpoint of them has other tensors, too."""
    save_file({"w_lora_a": torch.ones(1), "head": torch.ones(1)}, tmp_path / "x.safetensors")
    assert len(open_checkpoint(tmp_path / "x.safetensors", "given").tensors) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"version": "1.0"}'),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>"),
        ("README.md", b"# A model"),
        ("empty.txt", b""),
    ],
)
def test_a_file_that_is_no_weights(name: str, content: bytes, tmp_path: Path) -> None:
    """Not a broken file of torch: something else."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=rf"{name} is not weights: ") as error:
        open_checkpoint(tmp_path / name, "given")
    assert "torch file" not in str(error.value)
    assert "folder" in str(error.value.hint)


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(Unsupported, match=r"model-Q4_K\.gguf is a GGUF file"):
        open_checkpoint(tmp_path / "model-Q4_K.gguf", "given")


@pytest.mark.parametrize("save", [save_bin, save_old_bin])
def test_torch_files_of_any_name(
    save: Callable[[dict[str, Tensor], Path], None], tmp_path: Path
) -> None:
    save(weights(), tmp_path / "model.ckpt")
    assert_equal(load(open_checkpoint(tmp_path / "model.ckpt", "given")), weights())


def test_shards_without_index(tmp_path: Path) -> None:
    folder = LAYOUTS["safetensors-shards"](tmp_path / "base")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(NotFound, match=r"3 \.safetensors files and no model\.safetensors\.index"):
        open_checkpoint(folder, "given")


@pytest.mark.parametrize(
    ("name", "what"), [("model-Q4_K.gguf", "a GGUF file"), ("lit_model.pth", "LitGPT")]
)
def test_formats_that_are_known_and_not_read(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(Unsupported, match=what) as error:
        open_checkpoint(tmp_path, "given")
    assert "Hugging Face checkpoint" in str(error.value.hint)


@pytest.mark.parametrize("layout", ["safetensors-shards", "bin-shards"])
def test_missing_shard(layout: str, tmp_path: Path) -> None:
    folder = LAYOUTS[layout](tmp_path / "base")
    shard = next(folder.glob("*-00002-of-00003.*"))
    shard.unlink()
    with pytest.raises(NotFound, match=f"lacks {shard.name}"):
        open_checkpoint(folder, "given")


def test_tensor_missing_from_its_shard_with_a_near_one(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.ones(1)}, tmp_path / "one.safetensors")
    weight_map = {"layer.weight": "one.safetensors", "layers.weight": "one.safetensors"}
    as_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(FormatError, match=r"'layers\.weight' is in one\.safetensors") as error:
        open_checkpoint(tmp_path, "given")
    assert "'layer.weight'" in str(error.value.hint)


# --------------------------------------------------------------------------------------- side files

KEPT = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.spm", "chat_template.jinja"),
    *("modeling_custom.py", "qwen.tiktoken", "codes.bpe", "NOTES.md", "LICENSE", "NOTICE"),
    *("chat_templates/tools.jinja", "additional_chat_templates/a/b.jinja"),
}
LEFT = {
    *("training_args.bin", "optimizer.pt", "rng_state.pth", "events.out.tfevents", "image.png"),
    *("model.onnx", "flax_model.msgpack", "consolidated.safetensors", "runs/", "1_Pooling/"),
    *("adapter_config.json", "trainer_state.json", "all_results.json"),
}
# Written anew, or hidden.
NEITHER = {"README.md", "weft.json", ".gitattributes", ".cache/huggingface/x.json"}


def test_side_files(tmp_path: Path) -> None:
    folder = LAYOUTS["safetensors"](tmp_path / "base")
    for name in (KEPT | LEFT | NEITHER) - {"config.json"}:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("{}")
    (folder / "runs/log.json").write_text("{}")
    (folder / "1_Pooling/config.json").write_text("{}")
    found = open_checkpoint(folder, "given")
    assert set(found.side_files) == KEPT
    assert set(found.left_out) == LEFT
    assert list(found.side_files) == sorted(found.side_files)


def test_side_files_of_sentence_transformers(tmp_path: Path) -> None:
    folder = LAYOUTS["safetensors"](tmp_path / "base")
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "other/config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../../etc"}]
    as_json(folder / "modules.json", modules)
    found = open_checkpoint(folder, "given")
    assert set(found.side_files) == {
        *("config.json", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"),
    }
    assert found.left_out == ("other/",)


def test_no_config(tmp_path: Path) -> None:
    folder = LAYOUTS["safetensors"](tmp_path / "base")
    (folder / "config.json").unlink()
    assert open_checkpoint(folder, "given").config == {}


# ------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON: it is empty"),
        (b"{", "is not JSON: line 1, column 2: Expecting property name"),
        (b'{"a": 1,\n "b": 2\n "c": 3}', "is not JSON: line 3, column 2: Expecting ','"),
        (b"<html>", "is not JSON: line 1, column 1: Expecting value"),
        (b'{"a": "\xff"}', "is not JSON: byte 7 is not UTF-8"),
        (b"[]", "is a JSON list"),
        (b"7", "is a JSON int"),
        (b"null", "is a JSON NoneType"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_read_json(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "it.json").write_bytes(content)
    with pytest.raises(FormatError, match=says) as error:
        read_json(tmp_path / "it.json")
    assert "it.json" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert error.value.hint == "correct it there, or save or download the file again"


def test_read_json_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(FormatError, match="cannot read"):
            read_json(path)


@pytest.mark.parametrize("broken", ["base/config.json", "adapter/adapter_config.json"])
def test_broken_configs(broken: str, tmp_path: Path) -> None:
    """Where in the file, and what to do."""
    LAYOUTS["safetensors"](tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / broken).write_text('{\n  "r": 8,\n}')
    with pytest.raises(FormatError, match=rf"{broken} is not JSON: line \d, column \d") as error:
        weft.inspect((tmp_path / broken).parent)
    assert "download the file again" in str(error.value.hint)


def change_time(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def change_content(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def change_size(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def change_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    stat = path.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(path)


def change_and_hide(path: Path) -> None:
    """Other content, same size, and the modification time set back."""
    stat = path.stat()
    change_content(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "change", [change_time, change_content, change_size, change_file, change_and_hide]
)
def test_identity_changes_with_the_file(change: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    before = identify(path)
    assert identify(path) == before
    time.sleep(0.02)  # the clock of the file system
    change(path)
    assert identify(path) != before


def test_describe_input(tmp_path: Path) -> None:
    folder = LAYOUTS["safetensors"](tmp_path / "base")
    weight, config = sources = open_checkpoint(folder, "given").sources
    entry = describe_input("base", weight)
    assert (entry.role, entry.path) == ("base", str(folder / "model.safetensors"))
    assert entry.size == (folder / "model.safetensors").stat().st_size
    assert entry.content is None
    assert describe_input("base", config).content == config.header  # of the whole file
    assert describe_input("base", config).header is None
    change_content(folder / "model.safetensors")
    as_json(folder / "config.json", CONFIG | {"vocab_size": 17})
    again = open_checkpoint(folder, "given").sources
    assert [one.header == other.header for one, other in zip(sources, again, strict=True)] == [
        *(True, False)
    ]
    assert not {source.identity for source in sources} & {source.identity for source in again}


def test_an_adapters_file_that_changed_is_not_hashed(tmp_path: Path) -> None:
    """Its hash would be of other values than those of the header that was read."""
    name = "model.safetensors"
    folder = LAYOUTS["safetensors"](tmp_path / "base")
    sources = {Path(s.path).name: s for s in open_checkpoint(folder, "given").sources}
    time.sleep(0.02)
    change_file(folder / name)
    with pytest.raises(FormatError, match=rf"{name} changed while it was being read"):
        describe_input("adapter 1", sources[name])
    (folder / name).unlink()
    with pytest.raises(FormatError, match=rf"cannot read .*{name}"):
        describe_input("adapter 1", sources[name])


@pytest.mark.parametrize("layout", ["safetensors", "bin", "bin-legacy", "safetensors-shards"])
def test_identity_is_of_the_file_that_was_read(layout: str, tmp_path: Path) -> None:
    """Another file of the same header that takes its name afterwards is another file."""
    folder = LAYOUTS[layout](tmp_path / "base")
    for source in open_checkpoint(folder, "given").sources:
        path = Path(source.path)
        assert source.identity == identify(path)
        change_file(path)
        assert source.identity != identify(path)


# -------------------------------------------------------------------------------------------- bytes


def refs_of(path: Path, **values: Tensor) -> dict[str, TensorRef]:
    save_file(values, path)
    return open_checkpoint(path, "given").tensors


@pytest.mark.parametrize("place", [0, 2**20, 2**22 + 1, 2**22 + 4095])
def test_same_bytes(place: int, tmp_path: Path) -> None:
    """Over several blocks, with the one difference in any of them."""
    one = torch.zeros(2**22 + 4096, dtype=torch.uint8)
    other = one.clone()
    other[place] = 1
    refs = refs_of(tmp_path / "x.safetensors", one=one, same=one.clone(), other=other)
    assert same_bytes(refs["one"], refs["same"])
    assert same_bytes(refs["one"], refs["one"])
    assert not same_bytes(refs["one"], refs["other"])


def test_same_bytes_wants_the_same_kind(tmp_path: Path) -> None:
    refs = refs_of(
        tmp_path / "x.safetensors",
        one=torch.zeros(4),
        shape=torch.zeros(2, 2),
        dtype=torch.zeros(4, dtype=torch.int32),
    )
    assert not same_bytes(refs["one"], refs["shape"])
    assert not same_bytes(refs["one"], refs["dtype"])


def bytes_read() -> int:
    """What this process has read so far, by the kernel's count."""
    path = Path("/proc/self/io")
    if not path.exists():
        pytest.skip("no /proc")
    return int(path.read_text().split()[1])


def test_same_bytes_stops_at_the_first_difference(tmp_path: Path) -> None:
    """An embedding and a head that are not tied differ at once: gigabytes need not be read."""
    one = torch.zeros(2**26, dtype=torch.uint8)
    other = one.clone()
    other[0] = 1
    refs = refs_of(tmp_path / "x.safetensors", one=one, other=other)
    before = bytes_read()
    assert not same_bytes(refs["one"], refs["other"])
    assert bytes_read() - before < 2**25


def test_same_bytes_of_a_file_that_became_shorter(tmp_path: Path) -> None:
    refs = refs_of(tmp_path / "x.safetensors", one=torch.zeros(64), other=torch.zeros(64))
    os.truncate(tmp_path / "x.safetensors", 100)
    with pytest.raises(FormatError, match="became shorter while it was being read"):
        same_bytes(refs["one"], refs["other"])


def test_describe_input_that_is_copied(tmp_path: Path) -> None:
    """Whatever is in it: all of it counts."""
    folder = LAYOUTS["safetensors"](tmp_path / "base")
    before = describe_copied("base", folder / "model.safetensors")
    change_content(folder / "model.safetensors")
    after = describe_copied("base", folder / "model.safetensors")
    assert before.header is None
    assert before.content != after.content


def test_bits_of_a_tensor_read_no_more_than_it(tmp_path: Path) -> None:
    large = tmp_path / "large.safetensors"
    values = np.arange(-3, 3, dtype="<f4").reshape(2, 3)
    with large.open("wb") as file:
        file.truncate(2**34)  # sparse: reading it whole takes 16 GiB
        file.seek(2**33)
        file.write(values.tobytes())
    ref = TensorRef(str(large), "x", "float32", (2, 3), 2**33, 2**33 + values.nbytes)
    assert (bits(ref) == values.view("u4")).all()
