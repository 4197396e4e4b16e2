"""Files that lie are refused in one line, whatever the lie; what they hold is never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import make
import pytest
import torch

from weft.cli.app import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CORPUS = make.CORPUS
GOOD = CORPUS / "good"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, in which nothing may be left behind."""
    monkeypatch.chdir(tmp_path)
    before = snapshot(CORPUS)
    yield tmp_path
    assert snapshot(CORPUS) == before, "the input was changed"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """The exit code of a command line, its stdout and its stderr, encoded as a terminal's are."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    for stream in (out, err):
        stream.flush()
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def assert_refused(result: tuple[int, str, str], *says: str) -> None:
    """One clear error that names what is wrong, and nothing else."""
    code, out, err = result
    lines = err.splitlines()
    assert "Traceback" not in err, err
    assert code == 2, err
    assert out == ""
    assert sum(line.startswith("error: ") for line in lines) == 1, err
    assert sum(line.startswith("hint: ") for line in lines) <= 1, err
    # Nothing but the error, the hint, and lines that belong to them; a note may come before.
    assert all(line.startswith(("error: ", "hint: ", "  ", "note: ")) for line in lines), err
    assert all(char.isprintable() or char == "\n" for char in err), ascii(err)
    assert max(map(len, lines)) < 1200, f"{max(map(len, lines))} characters in a line"
    for part in says:
        assert part in err, err


# Sound files that do not make a merged weight: `inspect` says what they are, and why not.
DESCRIBED = {
    f"adapter/{name}"
    for name in ("peft-type-escapes", "r-float", "r-other", "alpha-missing", "variant-unknown")
}


def assert_described(result: tuple[int, str, str], *says: str) -> None:
    code, out, err = result
    assert (code, err) == (0, "")
    assert "\nnot merged  " in out
    assert all(char.isprintable() or char == "\n" for char in out), ascii(out)
    for part in says:
        assert part in out, out


def commands(found: make.Case, path: Path) -> list[list[str | Path]]:
    if found.adapter:
        return [["inspect", path], ["merge", GOOD / "base", path, "-o", "out"]]
    return [["inspect", path], ["merge", path, GOOD / "adapter", "-o", "out"]]


# --------------------------------------------------------------------------------------- the corpus


@pytest.mark.parametrize("found", make.cases(), ids=lambda found: found.name)
def test_refused(found: make.Case, here: Path) -> None:
    for arguments in commands(found, CORPUS / found.name):
        described = arguments[0] == "inspect" and found.name in DESCRIBED
        check = assert_described if described else assert_refused
        check(run(*arguments), found.says, found.culprit)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("base", ["base", "zip", "legacy"])
def test_sound_files_are_not_refused(base: str, here: Path) -> None:
    """The frame of every case is sound: it is the one thing that was broken which is refused."""
    code, out, err = run("inspect", GOOD / base)
    assert (code, err) == (0, "")
    assert "base model" in out
    code, out, err = run("merge", GOOD / base, GOOD / "adapter", "-o", "out")
    assert code == 0, err
    merged = (here / "out/model.safetensors").read_bytes()[-80:]
    A = torch.tensor([n / 16 for n in range(1, 9)]).view(2, 4)
    B = torch.tensor([n / 16 for n in range(9, 17)]).view(4, 2)
    W = torch.tensor([1 + n / 8 for n in range(16)]).view(4, 4)
    assert merged[:64] == (W + 2 * B @ A).numpy().tobytes()


def test_every_kind_of_lie_has_a_case() -> None:
    groups = {found.name.partition("/")[0] for found in make.cases()}
    assert groups == {"safetensors", "index", "config", "adapter", "pickle"}
    names = [found.name for found in make.cases()]
    assert len(names) == len(set(names)) > 200


def test_corpus_is_what_make_writes(tmp_path: Path) -> None:
    make.write_good(tmp_path)
    make.write(tmp_path, make.cases())
    written = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    kept = {p.relative_to(CORPUS): p.read_bytes() for p in CORPUS.rglob("*") if p.is_file()}
    assert written == kept
    assert sum(map(len, kept.values())) < 200_000


def test_large_lies(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("large")
    for found in make.large(folder):
        for arguments in commands(found, folder / found.name):
            assert_refused(run(*arguments), found.says, found.culprit)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["pickle/system-zip.bin", "safetensors/length-2-to-63.safetensors", "adapter/r-null"]
)
def test_refused_by_the_program(name: str, here: Path) -> None:
    """The same through a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "weft", "inspect", CORPUS / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused((done.returncode, done.stdout, done.stderr), Path(name).name)
    assert list(here.iterdir()) == []


# --------------------------------------------------------------------------------- code in pickles

PAYLOADS = [found for found in make.cases() if "system" in found.name]


@pytest.mark.parametrize("found", PAYLOADS, ids=lambda found: found.name)
@pytest.mark.filterwarnings("ignore")
def test_payload_would_run(found: make.Case, here: Path) -> None:
    """The payloads are live: a loader that trusts the file runs them."""
    places = [CORPUS / found.name, *(CORPUS / found.name).glob("*.bin")]
    path = next(place for place in places if place.is_file())
    with suppress(Exception):  # most of them hold nothing that could be loaded besides
        if "plain-pickle" in found.name:
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
    assert (here / make.CANARY).exists()


def test_payload_in_a_hidden_place_does_not_run(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the function is called that the payload names, by whichever way."""
    called: list[object] = []
    monkeypatch.setattr(os, "system", lambda *a: called.append(a))
    monkeypatch.setattr("posix.system", lambda *a: called.append(a))
    for found in PAYLOADS:
        for arguments in commands(found, CORPUS / found.name):
            run(*arguments)
    assert called == []
    assert list(here.iterdir()) == []


# ------------------------------------------------------------------------------------ wrong folders


def adapter_at(folder: Path) -> Path:
    make.write(folder.parent, [make.Case(folder.name, make.config(), "")])
    return folder


def base_at(folder: Path) -> Path:
    files = {p.name: p.read_bytes() for p in (GOOD / "base").iterdir()}
    make.write(folder.parent, [make.Case(folder.name, files, "")])
    return folder


def as_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def as_loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def as_dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


REPLACED = [as_folder, as_loop, as_dangling]


@pytest.mark.parametrize("broken", REPLACED)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_file_is_no_file(name: str, broken: Callable[[Path], None], here: Path) -> None:
    adapter = adapter_at(here / "adapter")
    broken(adapter / name)
    for arguments in (["inspect", adapter], ["merge", GOOD / "base", adapter, "-o", "out"]):
        assert_refused(run(*arguments), str(adapter))
    assert sorted(p.name for p in here.iterdir()) == ["adapter"]


@pytest.mark.parametrize("broken", REPLACED)
def test_base_weights_are_no_file(broken: Callable[[Path], None], here: Path) -> None:
    base = base_at(here / "base")
    broken(base / "model.safetensors")
    for arguments in (["inspect", base], ["merge", base, GOOD / "adapter", "-o", "out"]):
        assert_refused(run(*arguments), str(base))
    assert sorted(p.name for p in here.iterdir()) == ["base"]


@pytest.mark.parametrize("broken", REPLACED)
def test_shard_is_no_file(broken: Callable[[Path], None], here: Path) -> None:
    files = make.index({"a": "one.safetensors", "b": "two.safetensors"})
    make.write(here, [make.Case("base", files, "")])
    assert run("inspect", "base")[0] == 0
    broken(here / "base/two.safetensors")
    for arguments in (["inspect", "base"], ["merge", "base", GOOD / "adapter", "-o", "out"]):
        assert_refused(run(*arguments), "two.safetensors", str(here / "base"))
    assert sorted(p.name for p in here.iterdir()) == ["base"]


@pytest.mark.parametrize("broken", [as_loop, as_dangling])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_file_beside_the_weights_is_no_file(
    name: str, broken: Callable[[Path], None], here: Path
) -> None:
    """It cannot be copied; that is said before the work and not after it."""
    base = base_at(here / "base")
    broken(base / name)
    result = run("merge", base, GOOD / "adapter", "-o", "out")
    assert_refused(result, name)
    assert sorted(p.name for p in here.iterdir()) == ["base"]


@pytest.mark.parametrize("broken", REPLACED)
def test_path_is_no_path(broken: Callable[[Path], None], here: Path) -> None:
    broken(here / "it")
    for arguments in (
        ["inspect", "it"],
        ["merge", "it", GOOD / "adapter", "-o", "out"],
        ["merge", GOOD / "base", "it", "-o", "out"],
        ["merge", "it", "-o", "out"],
    ):
        assert_refused(run(*arguments), "it")
    assert [p.name for p in here.iterdir()] == ["it"]


def test_files_instead_of_folders(here: Path) -> None:
    (here / "notes.txt").write_text("an adapter, some day")
    for adapter in ("notes.txt", GOOD / "base/model.safetensors", os.devnull):
        result = run("merge", GOOD / "base", adapter, "-o", "out")
        assert_refused(result, "no adapter in", Path(adapter).name)
    for base in ("notes.txt", os.devnull, GOOD / "base/config.json"):
        assert_refused(run("inspect", base), Path(base).name)
        result = run("merge", base, GOOD / "adapter", "-o", "out")
        assert_refused(result, Path(base).name)
    assert [p.name for p in here.iterdir()] == ["notes.txt"]


def test_base_and_adapter_confused(here: Path) -> None:
    result = run("merge", GOOD / "base", GOOD / "base", "-o", "out")
    assert_refused(result, "is a base model, not an adapter", "good/base")
    result = run("merge", GOOD / "base", "-o", "out")
    assert_refused(result, "is no adapter (it has no adapter_config.json), and nothing else")
    assert list(here.iterdir()) == []


def test_adapter_without_config(here: Path) -> None:
    (adapter_at(here / "adapter") / "adapter_config.json").unlink()
    result = run("merge", GOOD / "base", "adapter", "-o", "out")
    assert_refused(result, "no adapter_config.json", "adapter")
    assert [p.name for p in here.iterdir()] == ["adapter"]


def test_half_an_index(here: Path) -> None:
    """Shards without their index could be any part of the model."""
    make.write(here, [make.Case("base", make.SHARDS, "")])
    assert_refused(run("inspect", "base"), "2 .safetensors files and no", "base")


# -------------------------------------------------------------------------------- never a traceback

# What may mean something or nothing: it must be read or refused, and never be a defect of weft.
ODD_BASE_CONFIGS = {
    "architectures": [5, "Llama", [5], [None], [], {"a": 1}, None, [["Llama"]]],
    "model_type": [5, [], {}, None],
    "tie_word_embeddings": ["yes", 5, [], None],
    "vocab_size": ["many", -1, [], 1e999, None, {}],
    "hidden_size": ["many", [], {}],
    "num_hidden_layers": ["many", [], {}],
    "quantization_config": ["gptq", 5, [1], True],
    "text_config": ["text", 5, [1]],
    "torch_dtype": [5, [], "float77"],
    "is_encoder_decoder": ["no", []],
    "_name_or_path": [5, [], "\u001b[2J\nerror: none", "/" * 300],
}
ODD_ADAPTER_CONFIGS = {
    "target_modules": [5, None, {}, [[5]]],
    "base_model_name_or_path": [5, [], {}, "\u001b[2J\nerror: none", "x" * 5000],
    "revision": [5, [], "../.."],
    "task_type": [5, [], {}, "\u001b[2J"],
    "peft_version": [5, [], {}],
    "layers_to_transform": ["all", {}],
    "trainable_token_indices": [5, ["a"], {"layer": "a"}],
    "init_lora_weights": [5, [], {}, "\u001b[2J"],
    "bias": [5, []],
    "fan_in_fan_out": ["no", 5],
    "lora_dropout": ["no", []],
    "modules_to_save": [{}, [[]], [None], True],
    "rank_pattern": [{"layer": [2]}, {"layer": {}}, 5, "layer", True],
    "alpha_pattern": [{"layer": [2]}, {"layer": {}}, 5, "layer", {"": 4}],
    "use_rslora": [5, [], None],
    "use_dora": [5, [], None],
    "lora_bias": ["no", 5],
    "ensure_weight_tying": ["no", 5],
    "runtime_config": [5, [], {}],
    "\u001b[2Juse_x": [True],
    "use_\u001b[2J": [True, "true"],
}


def odd(configs: dict[str, list[object]]) -> list[object]:
    return [
        pytest.param(field, value, id=f"{ascii(field)[1:-1]}={ascii(value)[:30]}")
        for field, values in configs.items()
        for value in values
    ]


def assert_no_defect(result: tuple[int, str, str]) -> None:
    code, out, err = result
    assert code in (0, 2), err
    assert "Traceback" not in err
    assert (code == 0) != ("error: " in err)
    assert "\u001b" not in out + err, "a terminal obeys it"
    out.encode()


@pytest.mark.parametrize(("field", "value"), odd(ODD_BASE_CONFIGS))
def test_odd_base_config(field: str, value: object, here: Path) -> None:
    base = base_at(here / "base")
    (base / "config.json").write_text(json.dumps(make.BASE_CONFIG | {field: value}))
    assert_no_defect(run("inspect", base))
    assert_no_defect(run("inspect", base, "--json"))
    assert_no_defect(run("merge", base, GOOD / "adapter", "-o", "out"))


@pytest.mark.parametrize(("field", "value"), odd(ODD_ADAPTER_CONFIGS))
def test_odd_adapter_config(field: str, value: object, here: Path) -> None:
    make.write(here, [make.Case("adapter", make.config(**{field: value}), "")])
    assert_no_defect(run("inspect", "adapter"))
    assert_no_defect(run("inspect", "adapter", "--json"))
    assert_no_defect(run("merge", GOOD / "base", "adapter", "-o", "out"))


@pytest.mark.parametrize("content", ["", "[", "5", "{}", "[5]", '[{"path": 5}]', '[{"path": "/"}]'])
def test_odd_modules_json(content: str, here: Path) -> None:
    """sentence-transformers says in it which folders belong to the model."""
    base = base_at(here / "base")
    (base / "modules.json").write_text(content)
    assert_no_defect(run("inspect", base))


@pytest.mark.parametrize(
    "given",
    [
        "x" * 300,
        "x/" * 3000,
        "~nobody-of-that-name/model",
        "org/na--me",
        "org/name.git",
        "org/-name",
        "../nowhere/../..",
        "org/name@",
        "org/name@" + "r" * 300,
        "",
        ":",
        "a:b:c",
        "org/name/../../..",
    ],
    ids=lambda given: given[:30] or "empty",
)
def test_odd_paths(given: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = ["--cache-dir", str(here / "cache")]
    for arguments in (
        ["inspect", given, *cache],
        ["merge", given, str(GOOD / "adapter"), "-o", "out", *cache],
        ["merge", str(GOOD / "base"), given, "-o", "out", *cache],
    ):
        assert_refused(run(*arguments))
    assert not (here / "out").exists()


def test_folder_name_that_is_no_text(here: Path) -> None:
    """Linux takes any bytes for a name; the card and the manifest quote it all the same."""
    base = here / os.fsdecode(b"ba\xffse")
    try:
        base_at(base)
    except OSError:
        pytest.skip("this file system takes text alone")
    assert_no_defect(run("inspect", base))
    assert_no_defect(run("inspect", base, "--json"))
    assert_no_defect(run("merge", base, GOOD / "adapter", "-o", "out"))


# ------------------------------------------------------------------------------------------ in time


def in_time(path: Path, seconds: float = 60) -> tuple[int, str, str]:
    """`weft inspect` of a file that a slow reader would not finish."""
    done = subprocess.run(
        [sys.executable, "-m", "weft", "inspect", path],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    return done.returncode, done.stdout, done.stderr


def test_duplicate_among_many_names_is_found_in_time(here: Path) -> None:
    names = ",".join(f'"{n}":1' for n in range(300_000))
    (here / "it.safetensors").write_bytes(make.header("{" + names + ',"299999":1}'))
    assert_refused(in_time(here / "it.safetensors"), "key '299999' twice")


def test_shape_of_many_factors_is_multiplied_in_time(here: Path) -> None:
    shape = "[" + "9," * 4_000_000 + "9]"
    (here / "it.safetensors").write_bytes(make.header(make.entry("4", shape), bytes(4)))
    assert_refused(in_time(here / "it.safetensors"), "tensor 'a'")


def test_archive_of_many_records_is_read_in_time(here: Path) -> None:
    with zipfile.ZipFile(here / "it.bin", "w") as archive:
        archive.writestr("archive/data.pkl", make.pickled(b"}"))
        archive.writestr("archive/version", "3")
        for number in range(20_000):
            archive.writestr(f"archive/data/{number}", b"")
    assert_refused(in_time(here / "it.bin"), "hold")
