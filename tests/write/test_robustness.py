"""Killed, starved or misused at any moment: no output that is not whole, and nothing lost."""

from __future__ import annotations

import errno
import filecmp
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import weft
from weft import api
from weft.cli.app import main
from weft.core.errors import OutputError, WeftError
from weft.formats import checkpoint
from weft.write._replace import exchange, replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

JOURNAL = "weft-journal.jsonl"
# Names by which transformers (and Weft) know that a folder holds weights.
WEIGHTS = {
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
}

# A process that has torch imported and does nothing with it: each run is a fork of it, which is a
# process of its own that can be killed, and starts in milliseconds.
NURSERY = """
import json, os, sys
import torch
import weft.api, weft.execute.health, weft.execute.threads, weft.plan.merge, weft.write.checkpoint
import weft.cli.commands
from weft.cli.app import main

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(job["stdout"], flags), 1)
        os.dup2(os.open(job["stderr"], flags), 2)
        sys.argv = ["weft", *job["arguments"]]
        code = 0
        try:
            exec(job["before"], {})
            main(job["arguments"])
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Nursery:
    """Runs `weft` in processes that begin warm.

    Attributes:
        process: The process that forks.
        folder: Where the output of the runs goes.
        pid: Of the run that was begun last.
    """

    process: subprocess.Popen[str]
    folder: Path
    pid: int = 0
    stderr: str = field(default="", init=False)
    stdout: str = field(default="", init=False)

    def begin(self, arguments: Sequence[str | Path], before: str = "") -> None:
        """Start a run; the code `before` is run in its process first."""
        assert self.process.stdin
        assert self.process.stdout
        if self.pid:  # of a test that failed
            self.kill()
            self.end()
        job = {
            "arguments": [str(argument) for argument in arguments],
            "before": before,
            "stdout": str(self.folder / "stdout"),
            "stderr": str(self.folder / "stderr"),
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.pid = int(self.process.stdout.readline())

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):  # it was faster
            os.kill(self.pid, number)

    def end(self) -> int:
        """Wait for the run; its exit code, negative if a signal ended it."""
        assert self.process.stdout
        patience = threading.Timer(60, self.kill)
        patience.start()
        code, self.pid = int(self.process.stdout.readline()), 0
        patience.cancel()
        self.stdout = (self.folder / "stdout").read_text()
        self.stderr = (self.folder / "stderr").read_text()
        return code

    def run(self, arguments: Sequence[str | Path], before: str = "") -> int:
        self.begin(arguments, before)
        return self.end()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        found = Nursery(process, tmp_path_factory.mktemp("nursery"))
        assert found.run(["--version"]) == 0, found.stderr  # it has imported what it will need
        yield found
        assert process.stdin
        process.stdin.close()


# ------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Model:
    """A base, an adapter for it, and what the merge of the two must be."""

    base: Path
    adapter: Path
    merged: Path

    def command(self, out: Path, *more: str) -> list[str | Path]:
        return ["merge", self.base, self.adapter, "-o", out, "--quiet", *more]


def make_model(folder: Path, layers: int, width: int, shards: int) -> Model:
    """A base in bfloat16: an embedding and `layers` square matrices, half of them adapted."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    torch.manual_seed(0)
    tensors = {"embed.weight": torch.randn(4 * width, width).bfloat16()}
    factors = {}
    for n in range(layers):
        tensors[f"layers.{n}.proj.weight"] = torch.randn(width, width).bfloat16()
        tensors[f"layers.{n}.norm.weight"] = torch.ones(width).bfloat16()
        if n % 2:
            key = f"base_model.model.layers.{n}.proj"
            factors[f"{key}.lora_A.weight"] = torch.randn(4, width)
            factors[f"{key}.lora_B.weight"] = torch.randn(width, 4)
    names = list(tensors)
    parts = [
        names[n * len(names) // shards : (n + 1) * len(names) // shards] for n in range(shards)
    ]
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    files = ["model.safetensors"] if shards == 1 else files
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, base / file, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    (base / "tokenizer.json").write_text('{"model": {}}')
    save_file(factors, adapter / "adapter_model.safetensors")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # the library gives them to their owner alone
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged = folder / "merged"
    weft.merge(base, adapter, output=merged, command="weft")
    return Model(base, adapter, merged)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("small"), layers=6, width=64, shards=2)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("single"), layers=4, width=64, shards=1)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """160 MB: large enough to take a moment."""
    return make_model(tmp_path_factory.mktemp("large"), layers=16, width=2048, shards=3)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def differences(folder: Path, merged: Path) -> list[str]:
    """Files that are not those of the undisturbed run; what names paths or a time aside."""
    mine, theirs = ({p.name for p in f.iterdir()} for f in (folder, merged))
    told = {"weft.json", "README.md"}
    common = sorted(mine & theirs - told)
    found = sorted(mine ^ theirs)
    found += [n for n in common if not filecmp.cmp(folder / n, merged / n, shallow=False)]
    if "weft.json" in mine:
        one, other = (json.loads((f / "weft.json").read_text()) for f in (folder, merged))
        found += [k for k in ("plan", "tensors", "totals") if one[k] != other[k]]
    return found


def assert_whole(out: Path, model: Model) -> None:
    assert differences(out, model.merged) == []
    assert not partial_of(out).exists()
    left = [p.name for p in out.parent.iterdir() if p.name.startswith(out.name) and p != out]
    assert left == []


def looks_like_a_model(folder: Path) -> bool:
    """Whether transformers or Weft would load it."""
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    for index in names & {name for name in WEIGHTS if name.endswith("index.json")}:
        shards = set(json.loads((folder / index).read_text())["weight_map"].values())
        names -= set() if shards <= names else {index}
    try:
        weft.inspect(folder)
    except WeftError:
        return bool(names & WEIGHTS) and "config.json" in names
    return True


def finish(nursery: Nursery, model: Model, out: Path) -> None:
    """Resume, and find what an undisturbed run makes."""
    assert nursery.run(model.command(out, "--resume")) == 0, nursery.stderr
    assert_whole(out, model)


# ----------------------------------------------------------------------------- killed at any moment


@pytest.mark.slow
def test_killed_at_random_moments(nursery: Nursery, large: Model, tmp_path: Path) -> None:
    """A dozen kills, each of the run that goes on from the one before or of a new one."""
    out = tmp_path / "out"
    begin = time.perf_counter()
    assert nursery.run(large.command(out)) == 0, nursery.stderr
    length = time.perf_counter() - begin
    assert_whole(out, large)
    shutil.rmtree(out)
    rng = random.Random(20240611)
    killed = receipts = 0
    for number in range(12):
        more = ["--resume"] if partial_of(out).exists() else []
        nursery.begin(large.command(out, *more))
        time.sleep(length * rng.random())
        nursery.kill()
        code = nursery.end()
        # What bears the output's name is whole, even where the process died on its way out.
        if code == 0 or out.exists():
            assert_whole(out, large)
            shutil.rmtree(out)
            continue
        killed += 1
        folder = partial_of(out)
        if (folder / JOURNAL).exists():
            receipts += (folder / JOURNAL).read_text().count("\n") > 1
        if number % 3 == 2 and folder.exists():
            finish(nursery, large, out)
            shutil.rmtree(out)
    assert killed >= 3
    assert receipts >= 1, "no run was killed in the midst of its work"
    finish(nursery, large, out)


# Kills the process before the step of the given number: each rename, unlink, open … of the run.
STEPS = """
import os, signal, sys
seen = 0
def watch(event, arguments):
    global seen
    if event not in {events!r} or {inside!r} not in str(arguments):
        return
    if event == "open" and arguments[1] == "r":
        return
    seen += 1
    if seen == {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
    if {kill} < 0:
        os.write(2, f"{{event}} {{arguments[:2]}}\\n".encode())
sys.addaudithook(watch)
"""
EVENTS = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "open",
    "shutil.copyfile",
}


def steps(kill: int, inside: Path) -> str:
    return STEPS.format(events=EVENTS, inside=str(inside), kill=kill)


def count_steps(nursery: Nursery, model: Model, out: Path, *more: str, before: str = "") -> int:
    assert nursery.run(model.command(out, *more), before + steps(-1, out)) == 0, nursery.stderr
    lines = [line for line in nursery.stderr.splitlines() if line.split()[0] in EVENTS]
    assert len(lines) > 8
    return len(lines)


@pytest.mark.parametrize("name", ["small", "single"])
def test_killed_at_every_step(
    name: str, nursery: Nursery, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: Model = request.getfixturevalue(name)
    out = tmp_path / "out"
    total = count_steps(nursery, model, out)
    shutil.rmtree(out)
    renamed = 0
    for number in range(1, total + 1):
        assert nursery.run(model.command(out), steps(number, out)) == -signal.SIGKILL
        if out.exists():  # all that is left to do is to sync the folder
            assert_whole(out, model)
            renamed += 1
        elif partial_of(out).exists():
            finish(nursery, model, out)
        shutil.rmtree(out, ignore_errors=True)
    assert renamed <= 2


@pytest.mark.parametrize("name", ["single", "small"])
def test_what_a_kill_leaves_is_not_taken_for_a_model(
    name: str, nursery: Nursery, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Or it is one, whole."""
    model: Model = request.getfixturevalue(name)
    out = tmp_path / "out"
    total = count_steps(nursery, model, out)
    shutil.rmtree(out)
    wrong = []
    for number in range(1, total + 1):
        nursery.run(model.command(out), steps(number, out))
        folder = partial_of(out)
        if looks_like_a_model(folder):
            missing = set(differences(folder, model.merged)) - {JOURNAL}
            wrong += [(number, sorted(missing))] if missing else []
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
    assert wrong == []


# For systems that cannot exchange two names.
TWO_RENAMES = "import weft.write._replace as r; r.exchange = lambda one, other: False\n"


def can_exchange(folder: Path) -> bool:
    for name in ("one", "other"):
        (folder / name).mkdir()
    done = exchange(folder / "one", folder / "other")
    for name in ("one", "other"):
        (folder / name).rmdir()
    return done


def assert_one_is_whole(out: Path, *models: Model) -> None:
    places = [out, *replaced(out)]
    assert [
        path
        for path in places
        for model in models
        if path.exists() and not differences(path, model.merged)
    ], "neither model is whole"


@pytest.mark.parametrize("before", ["", TWO_RENAMES], ids=["exchange", "two renames"])
def test_killed_while_it_replaces(
    before: str, nursery: Nursery, small: Model, single: Model, tmp_path: Path
) -> None:
    """With --force there is one of the two models, whole, at every moment; and under its name."""
    out = tmp_path / "out"
    atomic = not before and can_exchange(tmp_path)
    shutil.copytree(single.merged, out)
    total = count_steps(nursery, small, out, "--force", before=before)
    between = 0
    for number in range(1, total + 1):
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        shutil.copytree(single.merged, out)
        code = nursery.run(small.command(out, "--force"), before + steps(number, out))
        assert code == -signal.SIGKILL
        assert_one_is_whole(out, small, single)
        between += not out.exists()
        assert nursery.run(small.command(out, "--force")) == 0, nursery.stderr
        assert differences(out, small.merged) == []
        assert not partial_of(out).exists()
        for path in replaced(out):  # half deleted: it is for the user to say what it is
            assert not (path / "weft.json").exists()
    assert between == (not atomic)


@pytest.mark.parametrize("after", [False, True])
def test_killed_beside_the_exchange(
    after: bool, nursery: Nursery, small: Model, single: Model, tmp_path: Path
) -> None:
    if not can_exchange(tmp_path):
        pytest.skip("two names cannot be exchanged here")
    kill = f"""
import os, signal
import weft.write._replace as r
real = r.exchange
def exchange(one, other):
    if {after}:
        real(one, other)
    os.kill(os.getpid(), signal.SIGKILL)
r.exchange = exchange
"""
    out = tmp_path / "out"
    shutil.copytree(single.merged, out)
    assert nursery.run(small.command(out, "--force"), kill) == -signal.SIGKILL
    one, other = (small, single) if after else (single, small)
    assert differences(out, one.merged) == differences(partial_of(out), other.merged) == []
    assert nursery.run(small.command(out, "--force")) == 0, nursery.stderr
    assert_whole(out, small)


def test_old_model_comes_back_where_the_new_one_cannot(
    small: Model, single: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(single.merged, out)
    real = os.rename

    def faulty(one: Any, other: Any, **options: Any) -> None:
        if str(one).endswith(".partial") and str(other) == str(out):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(one, other, **options)

    monkeypatch.setattr("weft.write._replace.exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", faulty)
    assert_refused(run(*small.command(out, "--force")), str(partial_of(out)))
    assert differences(out, single.merged) == []
    assert replaced(out) == []


def test_what_is_left_of_a_replaced_model(small: Model, single: Model, tmp_path: Path) -> None:
    """A model goes where --force was said; anything else is somebody's, and named."""
    out = tmp_path / "out"
    old, half, alike = (out.with_name(f"out.replaced-{end}") for end in ("1", "2", "me"))
    shutil.copytree(single.merged, old)
    shutil.copytree(single.merged, alike)
    half.mkdir()
    (half / "config.json").write_text("{}")
    command = [argument for argument in small.command(out) if argument != "--quiet"]
    code, err = run(*command)
    assert code == 0
    assert [line for line in err.splitlines() if "is left of a model" in line] == [
        f"note: {path} is left of a model that was replaced: remove it" for path in (old, half)
    ]
    code, err = run(*command, "--force")
    assert code == 0
    assert err.count("is left of a model that was replaced") == 1
    assert differences(out, small.merged) == differences(alike, single.merged) == []
    assert not old.exists()
    assert [path.name for path in half.iterdir()] == ["config.json"]


@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_killed_between_bytes_and_receipt(
    calls: int, nursery: Nursery, small: Model, tmp_path: Path
) -> None:
    """Bytes are there and nobody knows it; or half a receipt is."""
    out = tmp_path / "out"
    kill = f"""
import os, signal
left, real = {calls}, os.write
def write(handle, data):
    global left
    if b'"name"' in data:
        left -= 1
        if not left:
            real(handle, data[:-{calls}])
            os.kill(os.getpid(), signal.SIGKILL)
    return real(handle, data)
os.write = write
"""
    assert nursery.run(small.command(out), kill) == -signal.SIGKILL
    assert not out.exists()
    assert not (partial_of(out) / JOURNAL).read_text().endswith("\n")
    finish(nursery, small, out)


def test_killed_again_and_again(nursery: Nursery, small: Model, tmp_path: Path) -> None:
    """Each run gets one receipt further than the one before; none is lost, none is done twice."""
    out = tmp_path / "out"
    kill = """
import os, signal
real, seen = os.write, 0
def write(handle, data):
    global seen
    if b'"name"' in data and b'"plan"' not in data:
        seen += 1
        if seen == {at}:
            real(handle, data)
            os.kill(os.getpid(), signal.SIGKILL)
    return real(handle, data)
os.write = write
"""
    receipts = [0]
    for number in range(40):
        # A resumed run first writes down again what it found; then comes what is new.
        at = 1
        more = ["--resume"] if number else []
        code = nursery.run(
            small.command(out, "--threads", "1", *more), kill.replace("{at}", str(at))
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL, nursery.stderr
        receipts.append((partial_of(out) / JOURNAL).read_text().count("\n") - 1)
        assert receipts[-1] > receipts[-2]
    assert_whole(out, small)
    assert len(receipts) > 4


# ------------------------------------------------------------------------------------------- resume


@pytest.fixture
def interrupted(nursery: Nursery, small: Model, tmp_path: Path) -> tuple[Model, Path]:
    """A run of a model of one's own that was killed when it was done, and had not said so."""
    for name in ("base", "adapter"):
        shutil.copytree(getattr(small, name), tmp_path / name)
    model = Model(tmp_path / "base", tmp_path / "adapter", small.merged)
    out = tmp_path / "out"
    kill = """
import os, signal
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
"""
    assert nursery.run(model.command(out), kill) == -signal.SIGKILL
    assert (partial_of(out) / JOURNAL).exists()
    return model, out


def merge(model: Model, out: Path, **options: Any) -> weft.Report:
    return weft.merge(model.base, model.adapter, output=out, command="weft", **options)


def copied(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in partial_of(out).iterdir()}


def run(*arguments: str | Path) -> tuple[int, str]:
    """The exit code of a command line, and its stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            return int(end.code or 0), err.getvalue()
    return 0, err.getvalue()


def assert_refused(result: tuple[int, str], *says: str) -> None:
    code, err = result
    assert code == 2, err
    assert "Traceback" not in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    for part in says:
        assert part in err


def test_resume_does_nothing_twice(interrupted: tuple[Model, Path]) -> None:
    model, out = interrupted
    report = merge(model, out, resume=True)
    assert report.resumed == report.totals.tensors == 13
    assert_whole(out, model)


def test_resume_of_what_is_done(interrupted: tuple[Model, Path]) -> None:
    model, out = interrupted
    merge(model, out, resume=True)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    # Whether these are the bytes of this very run, nobody has checked: not to be passed off as it.
    with pytest.raises(WeftError, match="exists and is not empty"):
        merge(model, out, resume=True)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_resume_without_a_beginning(small: Model, tmp_path: Path) -> None:
    """Nothing to go on from is no reason not to begin."""
    merge(small, tmp_path / "out", resume=True)
    assert_whole(tmp_path / "out", small)


def test_interrupted_run_is_neither_resumed_nor_deleted_unasked(
    interrupted: tuple[Model, Path],
) -> None:
    model, out = interrupted
    before = copied(out)
    assert_refused(run(*model.command(out)), str(partial_of(out)), "--resume", "--force")
    assert copied(out) == before


def test_force_starts_over(interrupted: tuple[Model, Path]) -> None:
    model, out = interrupted
    (partial_of(out) / "stray").write_text("of another run")
    report = merge(model, out, force=True)
    assert report.resumed == 0
    assert_whole(out, model)


def touch(path: Path) -> None:
    os.utime(path)


def rewrite(path: Path) -> None:
    """The same bytes in another file."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def other_values(path: Path) -> None:
    """Another training run of the same shape."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:begin] + bytes(b ^ (n % 4 == 0) for n, b in enumerate(data[begin:])))


def other_alpha(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16}))


CHANGES = {
    "touched base": ("base/model-00001-of-00002.safetensors", touch),
    "rewritten base": ("base/model-00002-of-00002.safetensors", rewrite),
    "other base": ("base/model-00002-of-00002.safetensors", other_values),
    "touched config": ("base/config.json", touch),
    "touched adapter": ("adapter/adapter_model.safetensors", touch),
    "other adapter": ("adapter/adapter_model.safetensors", other_values),
    "other alpha": ("adapter/adapter_config.json", other_alpha),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_after_an_input_changed(
    change: str, interrupted: tuple[Model, Path], tmp_path: Path
) -> None:
    model, out = interrupted
    before = copied(out)
    name, action = CHANGES[change]
    action(tmp_path / name)
    in_plan = change in ("other adapter", "other alpha")
    says = "begun with other inputs or options" if in_plan else name
    assert_refused(run(*model.command(out, "--resume")), says, "--force")
    assert copied(out) == before
    assert not out.exists()


OPTIONS = {
    "dtype": ["--dtype", "float32"],
    "shards": ["--max-shard-size", "20kB"],
    "one shard": ["--max-shard-size", "1GB"],
}


@pytest.mark.parametrize("option", [*OPTIONS, "weight", "two adapters"])
def test_resume_with_other_options(option: str, interrupted: tuple[Model, Path]) -> None:
    model, out = interrupted
    before = copied(out)
    command = model.command(out, "--resume", *OPTIONS.get(option, []))
    if option == "weight":
        command[2] = f"{model.adapter}:0.5"
    if option == "two adapters":
        command.insert(3, model.adapter)
    assert_refused(run(*command), "begun with other inputs or options", "--force")
    assert copied(out) == before
    merge(model, out, resume=True)
    assert_whole(out, model)


@pytest.mark.parametrize("cut", [*range(1, 12), 30, 60, 90, 150, 400, 10_000])
def test_journal_cut_anywhere(cut: int, interrupted: tuple[Model, Path]) -> None:
    """As a kill or a full disk leaves it: the last line is torn, or several are lost."""
    model, out = interrupted
    path = partial_of(out) / JOURNAL
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)])
    merge(model, out, resume=True)
    assert_whole(out, model)


@pytest.mark.parametrize("cut", [1, 20, 80])
def test_journal_goes_on_after_a_torn_line(
    cut: int, interrupted: tuple[Model, Path], nursery: Nursery
) -> None:
    """What comes after it must be found by the next resumed run."""
    model, out = interrupted
    path = partial_of(out) / JOURNAL
    path.write_bytes(path.read_bytes()[:-cut])
    kill = "import os, signal\nos.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
    assert nursery.run(model.command(out, "--resume"), kill) == -signal.SIGKILL
    assert merge(model, out, resume=True).resumed == 13
    assert_whole(out, model)


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"", b"\n", b"{}\n", b'{"plan": "x"}\n', b"\0" * 4096),
        b"\xff\xfe\x00",
        b"[]\n",
        b"null\n",
    ],
    ids=repr,
)
def test_journal_of_garbage(garbage: bytes, interrupted: tuple[Model, Path]) -> None:
    """Refused or begun again; never half believed, and never a traceback."""
    model, out = interrupted
    (partial_of(out) / JOURNAL).write_bytes(garbage)
    try:
        assert merge(model, out, resume=True).resumed == 0
    except WeftError:
        assert not out.exists()
        return
    assert_whole(out, model)


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"{}\n", b"[]\n", b'{"name": "no such"}\n', b"\0" * 99),
        b"\xff\xff\n",
        b'{"name": []}\n',
    ],
    ids=repr,
)
def test_journal_with_garbage_at_its_end(garbage: bytes, interrupted: tuple[Model, Path]) -> None:
    """A file system that lost power."""
    model, out = interrupted
    with (partial_of(out) / JOURNAL).open("ab") as journal:
        journal.write(garbage)
    try:
        merge(model, out, resume=True)
    except WeftError:
        assert not out.exists()
        return
    assert_whole(out, model)


def test_machine_that_was_started_anew(interrupted: tuple[Model, Path]) -> None:
    """Receipts say that bytes were written, and not that they had reached the disk."""
    model, out = interrupted
    path = partial_of(out) / JOURNAL
    head, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps(json.loads(head) | {"boot": "another"}) + "\n" + rest)
    for shard in partial_of(out).glob("*.safetensors*"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert merge(model, out, resume=True).resumed == 0
    assert_whole(out, model)


def test_shard_that_somebody_deleted(interrupted: tuple[Model, Path]) -> None:
    model, out = interrupted
    for n, action in enumerate((Path.unlink, lambda p: os.truncate(p, 1000))):
        kept = partial_of(out).with_name("kept")
        shutil.copytree(partial_of(out), kept)
        action(next(iter(sorted(partial_of(out).glob("*-00002-of-*")))))
        report = merge(model, out, resume=True)
        assert 0 < report.resumed < 13, n
        assert_whole(out, model)
        shutil.rmtree(out)
        kept.rename(partial_of(out))


def test_stray_files_do_not_get_into_the_output(interrupted: tuple[Model, Path]) -> None:
    """Those of a run that had got nowhere, say under another name of the base's files."""
    model, out = interrupted
    (partial_of(out) / JOURNAL).write_bytes(b"")
    (partial_of(out) / "stray.safetensors").write_bytes(b"of another run")
    (partial_of(out) / "folder").mkdir()
    merge(model, out, resume=True)
    assert_whole(out, model)


# --------------------------------------------------------------------------------------- full disks


def test_file_size_limit(nursery: Nursery, small: Model, tmp_path: Path) -> None:
    """`ulimit -f`, which says EFBIG where a full disk says ENOSPC."""
    out = tmp_path / "out"
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    assert nursery.run(small.command(out), limit) == 2
    assert_refused((2, nursery.stderr), "file-size limit", "--max-shard-size", str(partial_of(out)))
    assert not out.exists()
    again = [] if not partial_of(out).exists() else ["--resume"]
    assert nursery.run(small.command(out, *again)) == 0, nursery.stderr
    assert_whole(out, small)


def test_file_size_limit_of_a_process(small: Model, tmp_path: Path) -> None:
    """The same through the program itself, from the outside."""
    limited = ["sh", "-c", 'ulimit -f 20 && exec "$@"', "sh", sys.executable, "-m", "weft"]
    done = subprocess.run(
        [*limited, *map(str, small.command(tmp_path / "out"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused((done.returncode, done.stderr), "file-size limit")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_is_too_small(small_disk: Path, small: Model) -> None:
    """Said before anything is written."""
    (small_disk / "filler").write_bytes(bytes(980_000))
    out = small_disk / "out"
    assert_refused(run(*small.command(out)), "free, the output takes", "free some space")
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


def test_disk_that_fills_up(small_disk: Path, small: Model, nursery: Nursery) -> None:
    """While it is written to: the error says where and what next, and what is done stays done."""
    out = small_disk / "out"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(980_000))
    lie = """
import shutil
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
"""
    assert nursery.run(small.command(out), lie) == 2
    assert_refused((2, nursery.stderr), "the disk is full", str(partial_of(out)), "free some space")
    assert not out.exists()
    filler.unlink()
    again = ["--resume"] if partial_of(out).exists() else []
    assert nursery.run(small.command(out, *again)) == 0, nursery.stderr
    assert_whole(out, small)


FAULTS = [errno.ENOSPC, errno.EDQUOT, errno.EIO]


@pytest.mark.parametrize("fault", FAULTS, ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "call", ["pwrite", "copy_file_range", "write", "ftruncate", "fsync", "rename"]
)
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("cached", [False, True], ids=["direct", "cached"])
def test_faults_of_the_disk(
    cached: bool,
    call: str,
    after: int,
    fault: int,
    small: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the first, second or third call of each kind: an answer, and a resume that finishes."""
    if call == "copy_file_range" and not cached:
        pytest.skip("only what goes through the page cache is copied by the kernel")
    out = tmp_path / "out"
    real = getattr(os, call)
    left = [after]

    def faulty(*arguments: Any, **options: Any) -> Any:
        if left[0] == 0:
            raise OSError(fault, os.strerror(fault))
        left[0] -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, faulty)
    if cached:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    # The kernel's copy is not offered everywhere: where it fails so, bytes go the long way.
    recovers = call == "copy_file_range" and fault == errno.EIO
    result = run(*small.command(out))
    monkeypatch.undo()
    if recovers:
        assert result[0] == 0
    else:
        assert_refused(result, str(partial_of(out)))
        assert ("the disk is full" in result[1]) == (fault != errno.EIO)
        assert not out.exists()
        again = ["--resume"] if partial_of(out).exists() else []
        code, err = run(*small.command(out, *again))
        assert code == 0, err
    assert_whole(out, small)


def test_fault_of_the_background_flush(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux reports an error of writing back once per open file: it must be kept."""
    from weft.write._shard_file import Flusher

    calls: list[int] = []

    def faulty(handle: int) -> None:
        calls.append(handle)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(Flusher, "_STEP", 1)
    monkeypatch.setattr(os, "fdatasync", faulty)
    for n in range(20):  # the flusher is a thread that may come too late
        out = tmp_path / f"out{n}"
        result = run(*small.command(out, "--threads", "1"))
        if calls:
            break
    assert calls
    assert_refused(result, str(partial_of(out)))
    assert not out.exists()


@pytest.mark.parametrize("fault", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_copies_without_the_kernel(
    fault: int, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> int:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    merge(small, tmp_path / "out")
    assert_whole(tmp_path / "out", small)


@pytest.mark.parametrize(
    "call",
    [
        *("copy_file_range", "preadv"),
        "pwrite",
    ],
)
@pytest.mark.parametrize("cached", [False, True], ids=["direct", "cached"])
def test_short_reads_and_writes(
    cached: bool, call: str, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may always move less than it was asked to."""
    real = getattr(os, call)

    def pwrite(handle: int, data: Any, offset: int) -> int:
        return int(real(handle, bytes(data[: max(1, len(data) // 3)]), offset))

    def copy_file_range(source: int, target: int, count: int, *more: int) -> int:
        return int(real(source, target, max(1, count // 3), *more))

    def preadv(handle: int, into: list[memoryview], offset: int) -> int:
        return int(real(handle, [into[0][: max(1, len(into[0]) // 3)]], offset))

    if cached:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
        if call == "preadv":  # only where the kernel does not copy by itself
            monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(os, call, locals()[call])
    merge(small, tmp_path / "out")
    assert_whole(tmp_path / "out", small)


# ------------------------------------------------------------------------- outputs that cannot be


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_under_a_file(small: Model, tmp_path: Path, more: list[str]) -> None:
    (tmp_path / "note.txt").write_text("a file")
    assert_refused(run(*small.command(tmp_path / "note.txt" / "out", *more)), "is a file")


def test_under_proc(small: Model) -> None:
    """A file system that takes no files, whoever asks."""
    out = Path("/proc/weft-out")
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    assert_refused(run(*small.command(out)), "/proc")


@pytest.mark.parametrize("fault", [errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_read_only(
    fault: int, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real = os.mkdir

    def refuse(path: Any, *more: Any, **options: Any) -> None:
        if "out" in str(path):
            raise OSError(fault, os.strerror(fault))
        real(path, *more, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert_refused(run(*small.command(out)), f"cannot write {out}.partial", "that you may write to")
    assert list(tmp_path.iterdir()) == []


def test_read_only_disk(small_disk: Path, small: Model) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    out = small_disk / "out"
    assert_refused(run(*small.command(out)), f"cannot write {out}.partial", "Read-only file system")


@pytest.fixture
def unprivileged() -> Iterator[tuple[Path, str]]:
    """A folder that everybody may enter, and code after which the process is nobody special."""
    folder = Path(tempfile.mkdtemp(prefix="weft-test-"))
    folder.chmod(0o755)
    yield folder, "import os\nos.geteuid() or (os.setgid(65534), os.setuid(65534))\n"
    shutil.rmtree(folder)


@pytest.mark.parametrize("inside", [False, True])
def test_folder_without_permission(
    inside: bool, unprivileged: tuple[Path, str], nursery: Nursery, small: Model
) -> None:
    folder, become = unprivileged
    for name in ("base", "adapter"):
        shutil.copytree(getattr(small, name), folder / name)
    model = Model(folder / "base", folder / "adapter", small.merged)
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0o000 if inside else 0o555)
    out = closed / "deeper/out" if inside else closed / "out"
    assert nursery.run(model.command(out), become) == 2, nursery.stderr
    assert_refused((2, nursery.stderr), str(closed))
    closed.chmod(0o755)
    assert list(closed.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "base",
        *("base/config.json", "base/model-00001-of-00002.safetensors"),
        "adapter/adapter_model.safetensors",
    ],
)
def test_input_without_permission(
    name: str, unprivileged: tuple[Path, str], nursery: Nursery, small: Model
) -> None:
    folder, become = unprivileged
    for part in ("base", "adapter"):
        shutil.copytree(getattr(small, part), folder / part)
    model = Model(folder / "base", folder / "adapter", small.merged)
    (folder / name).chmod(0o000)
    assert nursery.run(model.command(folder / "out"), become) == 2, nursery.stderr
    assert_refused((2, nursery.stderr), str(folder / name))


# -------------------------------------------------------------------------------------- many files


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A base in three hundred shards."""
    return make_model(tmp_path_factory.mktemp("many"), layers=150, width=8, shards=300)


def test_more_shards_than_open_files(many: Model, nursery: Nursery, tmp_path: Path) -> None:
    """`ulimit -n 256`, as macOS has it: a limit that a program may raise by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 2000:
        pytest.skip("the system allows too few files")
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, {}))\n"
    out = tmp_path / "out"
    assert nursery.run(many.command(out), limit.format(hard)) == 0, nursery.stderr
    assert_whole(out, many)
    for more in ([], ["--dry-run"]):
        assert nursery.run(many.command(tmp_path / "other", *more), limit.format(256)) == 2
        says = ("300 shards take", "the system allows 256", "ulimit -n", "--max-shard-size")
        assert_refused((2, nursery.stderr), *says)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------ what is there


def test_existing_output(small: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(small, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert_refused(run(*small.command(out)), f"{out} exists and is not empty", "--force")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / "config.json").write_text("{}")
    assert run(*small.command(out, "--force"))[0] == 0
    assert_whole(out, small)


def test_empty_output_folder(small: Model, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(small, tmp_path / "out")
    assert_whole(tmp_path / "out", small)


def test_output_in_folders_that_are_not_there(small: Model, tmp_path: Path) -> None:
    out = tmp_path / "a/b/out"
    merge(small, out)
    assert_whole(out, small)


def test_output_through_a_link(small: Model, tmp_path: Path) -> None:
    """The link stays, and what it leads to is replaced."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    merge(small, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert_whole(tmp_path / "disk/out", small)


@pytest.mark.parametrize("content", ["notes.txt", "photo.png", "src/config.json"])
def test_force_on_what_is_no_model(content: str, small: Model, tmp_path: Path) -> None:
    """A slip of the finger must not delete somebody's work."""
    path = tmp_path / "out" / content
    path.parent.mkdir(parents=True)
    path.write_text("work")
    result = run(*small.command(tmp_path / "out", "--force"))
    assert_refused(result, "does not look like a model", "remove it yourself")
    assert path.read_text() == "work"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_on_a_project_with_a_config(small: Model, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text('{"name": "somebody\'s program"}')
    (tmp_path / "out/main.js").write_text("work")
    assert_refused(run(*small.command(tmp_path / "out", "--force")), "does not look like a model")
    assert (tmp_path / "out/main.js").read_text() == "work"


@pytest.mark.parametrize("part", ["base", "adapter", "parent"])
def test_output_over_an_input(part: str, small: Model, tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        shutil.copytree(getattr(small, name), tmp_path / "models" / name)
    model = Model(tmp_path / "models/base", tmp_path / "models/adapter", small.merged)
    out = model.base.parent if part == "parent" else getattr(model, part)
    for more in ([], ["--force"], ["--resume"]):
        assert_refused(run(*model.command(out, *more)), f"{out} holds the input", "another folder")
    assert differences(model.base, small.base) == []
    assert differences(model.adapter, small.adapter) == []


@pytest.mark.parametrize("how", ["--force", "--resume"])
@pytest.mark.parametrize("part", ["base", "adapter"])
def test_partial_folder_that_is_an_input(part: str, how: str, small: Model, tmp_path: Path) -> None:
    """Of `OUT.partial` Weft may believe that it is its own only if it is."""
    folder = tmp_path / "out.partial"
    shutil.copytree(getattr(small, part), folder)
    model = Model(
        *(folder if n == part else getattr(small, n) for n in ("base", "adapter")), small.merged
    )
    assert_refused(run(*model.command(tmp_path / "out", how)), str(folder))
    assert differences(folder, getattr(small, part)) == []


@pytest.mark.parametrize("how", ["--force", "--resume"])
def test_partial_folder_of_somebody_else(how: str, small: Model, tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / "thesis.tex").write_text("work")
    assert_refused(run(*small.command(tmp_path / "out", how)), str(folder))
    assert (folder / "thesis.tex").read_text() == "work"


@pytest.mark.parametrize("how", [[], ["--force"], ["--resume"]])
def test_partial_that_is_a_file(how: list[str], small: Model, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("work")
    assert_refused(run(*small.command(tmp_path / "out", *how)), "out.partial")
    assert (tmp_path / "out.partial").read_text() == "work"


@pytest.mark.parametrize("how", [[], ["--force"], ["--resume"]])
def test_output_is_a_file(how: list[str], small: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("work")
    assert_refused(run(*small.command(out, *how)), f"{out} is a file")
    assert_refused(run(*small.command(out / "deeper", *how)), str(out))
    assert out.read_text() == "work"


@pytest.mark.parametrize(
    "out",
    [
        "/",
        "x" * 255,
        "x" * 300,
        "/dev/null",
        "/dev/null/out",
    ],
)
def test_odd_outputs(
    out: str, small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for how in ([], ["--force"], ["--resume"], ["--dry-run"]):
        if how == ["--dry-run"] and out == "/dev/null/out":
            continue
        assert_refused(run(*small.command(Path(out), *how)))
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------- two at once

# Writes until it is told that it may go on.
WAIT = """
import os, time
from pathlib import Path
real = os.pwrite
def pwrite(handle, data, offset):
    while not Path({gate!r}).exists():
        time.sleep(0.005)
    return real(handle, data, offset)
os.pwrite = pwrite
"""


@pytest.fixture
def running(nursery: Nursery, small: Model, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An output that another process is writing to, and the file that lets it go on."""
    out, gate = tmp_path / "out", tmp_path / "gate"
    nursery.begin(small.command(out), WAIT.format(gate=str(gate)))
    deadline = time.monotonic() + 20
    while not (partial_of(out) / JOURNAL).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    yield out, gate
    gate.touch()
    if nursery.pid:
        nursery.end()


@pytest.mark.parametrize(
    "how",
    [
        "--resume",
        "--force",
    ],
)
def test_two_runs_at_once(
    how: str, running: tuple[Path, Path], nursery: Nursery, small: Model
) -> None:
    """The second is refused, whatever it was told, and the first one finishes."""
    out, gate = running
    before = sorted(p.name for p in partial_of(out).iterdir())
    result = run(*small.command(out, how))
    assert_refused(result, f"another run is writing {partial_of(out)}", "wait for it")
    assert sorted(p.name for p in partial_of(out).iterdir()) == before
    gate.touch()
    code = nursery.end()
    assert code == 0, nursery.stderr
    gate.unlink()
    assert_whole(out, small)


def test_two_runs_at_once_without_options(
    running: tuple[Path, Path], nursery: Nursery, small: Model
) -> None:
    out, gate = running
    assert_refused(run(*small.command(out)), str(partial_of(out)))
    gate.touch()
    code = nursery.end()
    assert code == 0, nursery.stderr


# -------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="SIGINT"),
        pytest.param(signal.SIGTERM, id="TERM"),
    ],
)
def test_interrupted(
    number: signal.Signals, running: tuple[Path, Path], nursery: Nursery, small: Model
) -> None:
    out, gate = running
    nursery.kill(number)
    time.sleep(0.1)
    gate.touch()
    code = nursery.end()
    if number is signal.SIGINT:
        assert code == 130, nursery.stderr
        assert nursery.stderr.splitlines()[0] == "error: interrupted"
        assert "--resume" in nursery.stderr
        assert "Traceback" not in nursery.stderr
    else:
        assert code == -signal.SIGTERM
    assert nursery.stdout == ""
    assert not out.exists()
    gate.unlink()
    finish(nursery, small, out)


def test_interrupted_program(large: Model, tmp_path: Path) -> None:
    """The same with a process of its own, and with Ctrl-C as a terminal sends it."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "weft", *map(str, large.command(out, "--threads", "1"))],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not (partial_of(out) / JOURNAL).exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "error: interrupted" in stderr
    assert "--resume" in stderr
    assert stdout == ""
    assert not out.exists()
    assert run(*large.command(out, "--resume"))[0] == 0
    assert_whole(out, large)


# ----------------------------------------------------------------- inputs that change under the run


def at_start(action: Callable[[], object]) -> Callable[[Any], None]:
    """Does `action` when the run has planned and begins to write."""

    def on_event(event: Any) -> None:
        if type(event).__name__ == "Started":
            action()

    return on_event


@pytest.fixture
def own(small: Model, tmp_path: Path) -> Model:
    """A model of which a test may change the files."""
    for name in ("base", "adapter"):
        shutil.copytree(getattr(small, name), tmp_path / name)
    return Model(tmp_path / "base", tmp_path / "adapter", small.merged)


@pytest.mark.parametrize(
    "name",
    [
        "base/model-00001-of-00002.safetensors",
        "base/config.json",
        "base/tokenizer.json",
        "adapter/adapter_model.safetensors",
    ],
)
def test_input_that_is_touched_meanwhile(name: str, own: Model, tmp_path: Path) -> None:
    """Which of the bytes were the old ones, and which the new, nobody can tell."""
    out = tmp_path / "out"
    time.sleep(0.02)
    with pytest.raises(OutputError, match="changed while it was being read") as error:
        merge(own, out, on_event=at_start(lambda: touch(tmp_path / name)))
    assert name in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize(
    "name",
    [
        "base/model-00001-of-00002.safetensors",
        "base/config.json",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ],
)
def test_input_that_is_replaced_before_the_plan(
    name: str, own: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header was that of another file, even if it reads the same."""
    real = api.open_inputs

    def open_inputs(*arguments: Any, **options: Any) -> Any:
        opened = real(*arguments, **options)
        rewrite(tmp_path / name)
        return opened

    monkeypatch.setattr(api, "open_inputs", open_inputs)
    with pytest.raises(WeftError, match=f"{name} changed while it was being read"):
        merge(own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_headers_are_read_once(own: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readings could be of two files."""
    read: list[str] = []
    real = checkpoint.read_safetensors_header

    def read_header(path: Path) -> Any:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(checkpoint, "read_safetensors_header", read_header)
    weft.plan_merge(own.base, own.adapter)
    assert sorted(read) == [
        "adapter_model.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize(
    "name", ["base/model-00001-of-00002.safetensors", "adapter/adapter_model.safetensors"]
)
@pytest.mark.parametrize("keep", [0, 2000])
def test_input_that_is_cut_meanwhile(keep: int, name: str, own: Model, tmp_path: Path) -> None:
    with pytest.raises(WeftError):
        merge(own, tmp_path / "out", on_event=at_start(lambda: os.truncate(tmp_path / name, keep)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "base/model-00001-of-00002.safetensors",
        "base/tokenizer.json",
        "adapter/adapter_model.safetensors",
    ],
)
def test_input_that_is_deleted_meanwhile(name: str, own: Model, tmp_path: Path) -> None:
    with pytest.raises(WeftError, match=r".") as error:
        merge(own, tmp_path / "out", on_event=at_start((tmp_path / name).unlink))
    assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_failed_run_leaves_no_threads_and_no_files_open(own: Model, tmp_path: Path) -> None:
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir())) if handles.exists() else 0
    for n in range(3):
        with pytest.raises(WeftError):
            merge(
                own,
                tmp_path / f"out{n}",
                on_event=at_start(lambda: touch(own.base / "config.json")),
            )
        merge(own, tmp_path / f"good{n}")
    if before:
        assert len(list(handles.iterdir())) <= before
    assert not [t.name for t in threading.enumerate() if t.name.startswith("weft")]
