"""`org/name@revision`: from the hub's cache, laid out by hand, and from a hub of one's own."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

import weft
from weft.core.errors import NotFound, WeftError
from weft.formats.checkpoint import open_checkpoint
from weft.formats.hub import resolve, wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
KEY = "base_model.model.layer"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and a cache of this test's own in place of the user's."""
    cache = tmp_path / "hf/hub"
    # huggingface_hub reads the environment when it is imported, which it is by now.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


def add(cache: Path, repo: str, commit: str, files: dict[str, bytes], *refs: str) -> Path:
    """Files of a repository as the hub's client stores them: blobs, and links to them."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    snapshot = folder / "snapshots" / commit
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for ref in refs:
        path = folder / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return folder


def base_files(value: float, folder: Path) -> dict[str, bytes]:
    path = folder / "scratch.safetensors"
    save_file({"layer.weight": torch.full((4, 4), float(value))}, path)
    return {"model.safetensors": path.read_bytes(), "config.json": b'{"model_type": "x"}'}


def adapter_files(folder: Path, **config: object) -> dict[str, bytes]:
    path = folder / "scratch.safetensors"
    A, B = torch.ones(1, 4), torch.ones(4, 1)
    save_file({f"{KEY}.lora_A.weight": A, f"{KEY}.lora_B.weight": B}, path)
    content = {"peft_type": "LORA", "r": 1, "lora_alpha": 1} | config
    return {
        "adapter_model.safetensors": path.read_bytes(),
        "adapter_config.json": json.dumps(content).encode(),
    }


@pytest.fixture
def filled(offline: Path, tmp_path: Path) -> Path:
    """A base in two revisions, and an adapter in a subfolder beside one at the top."""
    add(offline, "org/base", OLD, base_files(1, tmp_path), "v1", "refs/pr/7")
    add(offline, "org/base", NEW, base_files(2, tmp_path), "main")
    files = adapter_files(tmp_path, base_model_name_or_path="org/base")
    second = adapter_files(tmp_path, base_model_name_or_path="org/base", revision="v1")
    both = files | {f"checkpoints/last/{name}": data for name, data in second.items()}
    add(offline, "org/adapter", NEW, both, "main")
    return offline


def value(path: Path) -> float:
    ref = open_checkpoint(path, "given").tensors["layer.weight"]
    data = bytearray(Path(ref.file).read_bytes()[ref.start : ref.start + 4])
    return torch.frombuffer(data, dtype=torch.float32).item()


# ---------------------------------------------------------------------------------------- revisions


def test_default_revision(filled: Path) -> None:
    folder = resolve("org/base")
    assert folder == filled / "models--org--base/snapshots" / NEW
    assert value(folder) == 2


@pytest.mark.parametrize("revision", ["v1", OLD, "refs/pr/7"])
def test_revision_in_the_name(revision: str, filled: Path) -> None:
    assert value(resolve(f"org/base@{revision}")) == 1


@pytest.mark.parametrize("revision", ["v1", OLD, "refs/pr/7"])
def test_revision_as_an_option(revision: str, filled: Path) -> None:
    assert value(resolve("org/base", revision=revision)) == 1


def test_revision_in_the_name_comes_first(filled: Path) -> None:
    assert value(resolve("org/base@v1", revision="main")) == 1


@pytest.mark.parametrize("given", ["org/base@v9", "org/base@" + "3" * 40])
def test_revision_that_is_not_cached(given: str, filled: Path) -> None:
    with pytest.raises(NotFound, match=f"{given}.*offline mode.* cache has no whole copy") as error:
        resolve(given)
    assert "download it first" in str(error.value.hint)


# --------------------------------------------------------------------------------------- subfolders


def test_subfolder(filled: Path) -> None:
    top = filled / "models--org--adapter/snapshots" / NEW
    assert resolve("org/adapter") == top
    for given in ("org/adapter/checkpoints/last", "org/adapter/checkpoints/last@main"):
        assert resolve(given) == top / "checkpoints/last"


def test_subfolder_that_is_not_there(filled: Path) -> None:
    with pytest.raises(WeftError, match="nowhere"):
        weft.inspect("org/adapter/nowhere")


def test_adapter_names_its_base_and_the_revision_of_it(filled: Path, tmp_path: Path) -> None:
    """The one at the top names none, the one in the subfolder `v1`."""
    for given, expected in (("org/adapter", 3.0), ("org/adapter/checkpoints/last", 2.0)):
        out = tmp_path / "out"
        weft.merge(None, given, output=out, force=True)
        assert value(out) == expected


def test_links_of_the_cache_become_files(filled: Path, tmp_path: Path) -> None:
    weft.merge("org/base", "org/adapter", output=tmp_path / "out")
    files = list((tmp_path / "out").iterdir())
    assert {"config.json", "model.safetensors", "weft.json"} <= {f.name for f in files}
    assert not any(f.is_symlink() for f in files)
    assert (tmp_path / "out/config.json").read_bytes().startswith(b"{")


# -------------------------------------------------------------------------- folders of the cache


def test_repository_folder_given_directly(filled: Path) -> None:
    folder = filled / "models--org--base"
    assert value(resolve(str(folder))) == 2
    assert value(resolve(str(folder), revision="v1")) == 1
    assert value(resolve(str(folder), revision=OLD)) == 1
    assert value(resolve(str(folder / "snapshots" / OLD))) == 1


@pytest.mark.parametrize("revision", [None, "v9", "3" * 40])
def test_repository_folder_without_the_revision(revision: str | None, filled: Path) -> None:
    folder = filled / "models--org--base"
    (folder / "refs/main").unlink()
    with pytest.raises(NotFound, match=f"no snapshot of revision {revision or 'main'}"):
        resolve(str(folder), revision=revision)


def test_reference_to_a_snapshot_that_was_deleted(filled: Path) -> None:
    folder = filled / "models--org--base"
    (folder / "refs/main").write_text("3" * 40)
    with pytest.raises(NotFound, match="no snapshot of revision main"):
        resolve(str(folder))


def test_blob_that_was_deleted(filled: Path) -> None:
    """A link that leads nowhere, as after a cache was cleaned by hand."""
    link = filled / "models--org--base/snapshots" / NEW / "model.safetensors"
    link.resolve().unlink()
    with pytest.raises(WeftError, match=r"base"):
        weft.inspect("org/base")


def test_output_over_the_snapshot_that_is_read(filled: Path) -> None:
    snapshot = filled / "models--org--base/snapshots" / NEW
    with pytest.raises(WeftError, match="holds the input"):
        weft.merge(snapshot, "org/adapter", output=snapshot, force=True)
    assert (snapshot / "model.safetensors").is_symlink()


# ------------------------------------------------------------------------------------------- paths


def test_a_path_comes_before_the_hub(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "org/base").mkdir(parents=True)
    assert resolve("org/base") == Path("org/base")


@pytest.mark.parametrize(
    "given", ["./org/base", "/org/base", "~/org/base-that-is-not-there", "name", "a b/c", "../o/b"]
)
def test_what_cannot_be_on_the_hub(given: str, filled: Path) -> None:
    with pytest.raises(NotFound, match="no such file or folder: ") as error:
        resolve(given)
    assert given in str(error.value)


def test_home(filled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize("given", ["org/na--me", "org/name.git", "org/-name", "o/" + "x" * 200])
def test_names_that_the_hub_forbids(given: str, filled: Path) -> None:
    with pytest.raises(WeftError, match=r"na--me|name\.git|-name|xxx"):
        resolve(given)


# -------------------------------------------------------------------------------------- the program


def program(*arguments: str | Path, **environment: str | Path) -> tuple[int, str, str]:
    """`weft` with nothing of the user's own hub settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-m", "weft", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=kept | {"HF_HUB_OFFLINE": "1"} | {k: str(v) for k, v in environment.items()},
    )
    return done.returncode, done.stdout, done.stderr


def test_environment(filled: Path, tmp_path: Path) -> None:
    for settings in ({"HF_HOME": tmp_path / "hf"}, {"HF_HUB_CACHE": filled}):
        code, out, err = program("inspect", "org/base@v1", "--json", **settings)
        assert (code, err) == (0, "")
        assert json.loads(out)["path"].endswith(OLD)


def test_cache_dir_comes_before_the_environment(filled: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    add(other, "org/base", "0" * 39 + "5", base_files(5, tmp_path), "main")
    code, out, _ = program(
        "inspect", "org/base", "--json", "--cache-dir", other, HF_HOME=tmp_path / "hf"
    )
    assert code == 0
    assert json.loads(out)["path"] == str(other / "models--org--base/snapshots" / ("0" * 39 + "5"))


def test_not_cached(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    for arguments in (
        ["inspect", "org/missing@v2"],
        ["merge", "org/missing@v2", "org/adapter", "-o", "out"],
    ):
        code, out, err = program(*arguments, HF_HOME=empty)
        assert (code, out) == (2, "")
        error, hint = err.splitlines()
        assert error.startswith("error: no such file or folder: org/missing@v2")
        assert "its cache has no whole copy" in error
        assert hint.startswith("hint: ")
        assert "--cache-dir" in hint
        assert "HF_HOME" in hint
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- a hub of one's own


class Hub(ThreadingHTTPServer):
    """What the client asks of the hub for a download, answered from a dictionary.

    Attributes:
        repos: Name -> file -> content.
        gated: Repositories that anybody may see and nobody may download.
        fetched: The files that were downloaded.
        asked: The repositories whose files were asked for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        path = unquote(self.path.partition("?")[0]).strip("/")
        if path.startswith("api/models/"):
            _, _, org, name, *rest = path.split("/")
            self._about(f"{org}/{name}", rest)
        else:
            org, name, _, _, file = path.split("/", 4)
            self._file(f"{org}/{name}", file)

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def _about(self, repo: str, rest: list[str]) -> None:
        if rest[:1] != ["tree"]:
            self.server.asked.append(repo)
        files = self.server.repos.get(repo)
        if files is None:
            self._answer(404, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["revision"] and rest[1:] != ["main"]:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": n, "size": len(c)} for n, c in files.items()]
            self._answer(200, {}, json.dumps([t | {"oid": "0" * 40} for t in tree]).encode())
        else:
            siblings = [{"rfilename": name} for name in files]
            found = {"id": repo, "sha": NEW, "siblings": siblings, "tags": []}
            self._answer(200, {}, json.dumps(found | {"downloads": 0, "likes": 0}).encode())

    def _file(self, repo: str, file: str) -> None:
        if repo in self.server.gated:
            self._answer(403, {"X-Error-Code": "GatedRepo"})
            return
        content = self.server.repos[repo][file]
        if self.command == "GET":
            self.server.fetched.append(file)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._answer(200, {"X-Repo-Commit": NEW, "ETag": etag}, content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def online(hub: Hub, *arguments: str | Path, home: Path) -> tuple[int, str, str]:
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    return program(*arguments, HF_HOME=home, HF_HUB_DISABLE_PROGRESS_BARS="1", **settings)


def test_download(hub: Hub, tmp_path: Path) -> None:
    """One copy of the weights, and what belongs beside it; then all of it again from the cache."""
    files = base_files(3, tmp_path) | {"tokenizer.json": b"{}"}
    more = ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors")
    hub.repos["org/base"] = files | dict.fromkeys((*more, "onnx/config.json", "x.gguf"), b"x")
    code, out, err = online(hub, "inspect", "org/base", "--json", home=tmp_path / "home")
    assert code == 0, err
    assert json.loads(out)["path"].endswith(NEW)
    assert sorted(hub.fetched) == sorted(files)
    again = program("inspect", "org/base", "--json", HF_HOME=tmp_path / "home")
    assert again == (0, out, "")


def test_what_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/gated"] = base_files(3, tmp_path)
    hub.repos["org/empty"] = {"README.md": b"", "model-Q4.gguf": b"GGUF"}
    hub.gated.add("org/gated")
    for given, says in {
        "org/missing": "no such repository on the hub: org/missing",
        "org/gated": "org/gated is gated on the hub",
        "org/gated@v9": "org/gated on the hub has no revision 'v9'",
        "org/gated/there": "org/gated on the hub has no folder there",
        "org/empty": "org/empty on the hub holds no .safetensors and no pytorch_model.bin, but",
    }.items():
        code, out, err = online(hub, "inspect", given, home=tmp_path / "home")
        assert (code, out) == (2, "")
        assert says in err.splitlines()[0]
        assert len(err.splitlines()) <= 2, err
    assert hub.fetched == []


def test_nothing_is_fetched_for_a_recipe_with_mistakes(hub: Hub, tmp_path: Path) -> None:
    """The hub is asked what it has: a mistake in the file is said before gigabytes come."""
    hub.repos["org/base"] = base_files(3, tmp_path)
    text = (
        "merge_method: linear\nparameters: {wieght: 1}\nmodels: [model: org/base, model: org/no]\n"
    )
    (tmp_path / "recipe.yml").write_text(text)
    code, out, err = online(hub, "run", "recipe.yml", "--check", home=tmp_path / "home")
    assert (code, out) == (2, "")
    assert err.startswith("error: 2 problems in recipe.yml\n")
    assert "wieght" in err
    assert "no such repository on the hub: org/no" in err
    assert hub.fetched == []


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """One error, and soon: huggingface_hub alone tries for 23 s, with two lines each time."""
    begin = time.monotonic()
    with closing(socket.socket()) as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        code, out, err = program("inspect", "org/base", **settings)
    assert (code, out) == (2, "")
    error, hint = err.splitlines()
    assert error.startswith("error: no such file or folder: org/base; the hub cannot be reached (")
    assert "refused" in error
    assert hint.startswith("hint: download it first")
    assert time.monotonic() - begin < 15


def test_hub_that_does_not_answer(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        code, _, err = program("inspect", "org/base", HF_HUB_ETAG_TIMEOUT="1", **settings)
    assert code == 2
    assert "no answer in 1 s; HF_HUB_ETAG_TIMEOUT=60 waits longer" in err.splitlines()[0]


def test_cache_where_the_hub_cannot_be_reached(filled: Path, tmp_path: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf")}
        code, out, err = program("inspect", "org/base", "--json", **settings)
    assert (code, err) == (0, "")
    assert json.loads(out)["path"].endswith(NEW)


# ------------------------------------------------------------------------------- what is downloaded

BESIDE = ["config.json", "tokenizer.json", "tokenizer.model", "modeling_x.py", "LICENSE", "a.spm"]
NEVER = [
    *("original/consolidated.00.pth", "original/params.json", "original/model.safetensors"),
    *("onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.xml", "coreml/x.json"),
    *("tf_model.h5", "flax_model.msgpack", "model.onnx", "rust_model.ot", "model.gguf", "x.pth"),
    *("checkpoint-500/model.safetensors", "checkpoint-500/config.json", "runs/log.json"),
    *("training_args.bin", "optimizer.bin", "optimizer.pt", "image.png", ".gitattributes"),
]
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
PICKLES = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
INDEXES = ["model.safetensors.index.json", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        ([*SHARDS, INDEXES[0]], ["pytorch_model.bin", "consolidated.safetensors"]),
        ([*SHARDS, *INDEXES], [*PICKLES, "consolidated-00001.safetensors"]),
        ([*PICKLES, INDEXES[1]], ["consolidated.safetensors"]),
        (["pytorch_model.bin"], []),
        (["adapter_model.bin", "adapter_config.json"], []),
        (["adapter_model.safetensors", "adapter_config.json"], ["adapter_model.bin"]),
        (["consolidated.safetensors"], []),
        (["adapters.safetensors", "adapter_config.json"], ["0000100_adapters.safetensors"]),
        (["0000100_adapters.safetensors", "0000200_adapters.safetensors"], []),
        (["adapter_model.pt", "adapter_config.json"], ["recipe_state.pt"]),
        (["adapter_0.pt", "adapter_1.pt", "adapter_config.json"], []),
        (["adapter_model.safetensors", "adapter_config.json"], ["adapter_model.pt"]),
    ],
)
@pytest.mark.parametrize("inside", ["", "deep/er/"])
def test_wanted(weights: list[str], others: list[str], inside: str) -> None:
    files = [inside + file for file in [*weights, *others, *BESIDE, *NEVER]]
    files += ["elsewhere/" + file for file in weights]
    assert sorted(wanted(files, inside, "x")) == sorted(inside + f for f in [*weights, *BESIDE])


def test_wanted_folders() -> None:
    """Templates always; modules where there are such."""
    templates = ["chat_templates/a.jinja", "additional_chat_templates/b/c.jinja"]
    modules = ["1_Pooling/config.json", "2_Dense/model.safetensors"]
    files = ["model.safetensors", *templates, *modules, "other/config.json"]
    assert wanted(files, "", "x") == ["model.safetensors", *templates]
    found = wanted([*files, "modules.json"], "", "x")
    assert sorted(found) == sorted(["model.safetensors", "modules.json", *templates, *modules])


def test_merge_by_names(filled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = program("merge", "org/adapter", "-o", out, HF_HOME=tmp_path / "hf")
    assert code == 0, err
    assert value(out) == 3
    card = (out / "README.md").read_text()
    assert "- org/base\n- org/adapter\n" in card
    assert "base_model_relation: merge" in card
    assert err.startswith("note: org/base is the base, as org/adapter names it\n")


def test_a_run_asks_once(hub: Hub, tmp_path: Path) -> None:
    """For the adapter, too, which is looked at before it is read: it may meanwhile change."""
    hub.repos["org/base"] = base_files(3, tmp_path)
    hub.repos["org/adapter"] = adapter_files(tmp_path, base_model_name_or_path="org/base")
    out = tmp_path / "out"
    code, _, err = online(hub, "merge", "org/adapter", "-o", out, home=tmp_path / "home")
    assert code == 0, err
    assert hub.asked.count("org/adapter") == hub.asked.count("org/base") > 0


def test_revisions_in_a_recipe(filled: Path, tmp_path: Path) -> None:
    """Two revisions of one model are two models, and an adapter may have one, too."""
    (tmp_path / "recipe.yml").write_text(
        "merge_method: linear\nbase_model: org/base\nmodels:\n"
        "  - {model: org/base@v1, parameters: {weight: 3}}\n"
        "  - {model: org/base, parameters: {weight: 1}}\n"
        f"  - {{model: org/base@v1+org/adapter@{NEW}:0.5, parameters: {{weight: 4}}}}\n"
    )
    weft.run(tmp_path / "recipe.yml", output=tmp_path / "out")
    # The first is 1, the second 2, and the adapter adds half of 1 to 1.
    assert value(tmp_path / "out") == (3 * 1 + 1 * 2 + 4 * 1.5) / 8
    card = (tmp_path / "out/README.md").read_text()
    for name in ("org/base@v1", "org/base", f"org/adapter@{NEW}"):
        assert f"\n- {name}\n" in card


def test_a_revision_of_a_base(filled: Path, tmp_path: Path) -> None:
    """v1 is 1 and the newest 2: the base decides what the task vector is."""
    (tmp_path / "recipe.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: org/base@v1\n"
        "models: [{model: org/base, parameters: {weight: 3}}]\n"
    )
    weft.run(tmp_path / "recipe.yml", output=tmp_path / "out")
    assert value(tmp_path / "out") == 1 + 3 * (2 - 1)
