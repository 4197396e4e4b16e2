"""What a command imports, where it writes what, and how it ends: through processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import weft
from weft import native
from weft.cli.app import main
from weft.core.specs import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

GOOD = Path(__file__).parents[1] / "attacks/corpus/good"
MERGE = ["merge", GOOD / "base", GOOD / "adapter", "-o", "out"]
HEAVY = {"torch", "transformers", "huggingface_hub", "peft", "safetensors", "yaml"}

# Runs a command line and says on stderr which of the modules in `HEAVY` it has imported.
SPY = """
import sys
from weft.cli.app import main
code = 0
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code or 0
found = {name.partition(".")[0] for name in sys.modules} & {heavy!r}
print("imported:", *sorted(found), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def python(*arguments: str | Path, **options: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | options,
    )
    return done.returncode, done.stdout, done.stderr


def program(*arguments: str | Path, **options: str) -> tuple[int, str, str]:
    return python("-m", "weft", *arguments, **options)


def imported(arguments: Sequence[str | Path]) -> set[str]:
    code, _, err = python("-c", SPY.replace("{heavy!r}", repr(HEAVY)), *arguments)
    assert code == 0, err
    return set(err.splitlines()[-1].removeprefix("imported:").split())


# ---------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["merge", "--help"],
        ["run", "--help"],
        ["methods"],
        ["methods", "ties"],
        ["inspect", "--help"],
        ["demo", "--help"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported(arguments) == set()


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_inspect_of_safetensors_imports_nothing_heavy(name: str) -> None:
    assert imported(["inspect", GOOD / name]) == set()


def test_merge_imports_no_more_than_it_needs() -> None:
    found = imported(MERGE)
    assert not found & {"transformers", "huggingface_hub", "peft", "safetensors"}
    assert "torch" in found, "the spy sees nothing"


def test_import_of_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, weft; assert not {HEAVY!r} & set(sys.modules); weft.merge; import weft.api"
    assert python("-c", code) == (0, "", "")


# ---------------------------------------------------------------------------------- exit codes


def test_help_and_version() -> None:
    for arguments in (["--help"], ["-h"], ["merge", "--help"], []):
        code, out, err = program(*arguments)
        assert (code, err) == (0, "")
        assert "Usage: weft" in out
    for flag in ("--version", "-V"):
        code, out, err = program(flag)
        assert (code, err) == (0, "")
        loops = "compiled" if native.library() else "plain"
        assert out.strip() == f"0.1.0 ({loops} loops)"


def test_success() -> None:
    code, out, err = program(*MERGE)
    assert code == 0, err
    assert out.splitlines()[0] == "1 of 2 tensors changed, 80 B in out"
    assert "error" not in err


WRONG = [
    ["merge"],
    ["merge", "-o", "out"],
    ["merge", "BASE", "ADAPTER"],
    ["merge", "BASE", "-o", "out"],
    ["merge", "BASE", "BASE", "-o", "out"],
    ["merge", "./nowhere", "ADAPTER", "-o", "out"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--dtype", "int4"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--max-shard-size", "many"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--max-shard-size", "0GB"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--threads", "0"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--threads", "two"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--device", "tpu"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--device", "cuda:99"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--no-such-option"],
    ["merge", "BASE", "ADAPTER:nan", "-o", "out"],
    ["merge", "BASE", "ADAPTER:inf", "-o", "out"],
    ["inspect"],
    ["inspect", "./nowhere"],
    ["inspect", "BASE", "another"],
    ["inspect", "BASE", "--jsn"],
    ["no-such-command"],
    ["--no-such-option"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
@pytest.mark.parametrize("more", [[], ["--json"], ["-q"]], ids=["", "json", "quiet"])
def test_what_the_user_can_fix(
    arguments: list[str], more: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one error on stderr, nothing on stdout, nothing written."""
    places = {"BASE": str(GOOD / "base"), "ADAPTER": str(GOOD / "adapter")}
    for name, path in places.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    with pytest.raises(SystemExit) as end:
        main([*arguments, *more])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert "Traceback" not in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("arguments", [WRONG[1], WRONG[5], WRONG[-1]], ids=" ".join)
def test_what_the_user_can_fix_through_a_process(arguments: list[str], here: Path) -> None:
    code, out, err = program(*(a.replace("ADAPTER", str(GOOD / "adapter")) for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert list(here.iterdir()) == []


def test_a_defect_of_weft() -> None:
    """Exit code 3: the lines that a report needs, and that it should be reported."""
    code = "import weft.api\nfrom weft.cli.app import main\n"
    code += "weft.api.inspect = lambda *a, **k: 1 / 0\nmain(['inspect', 'x', '--json'])"
    status, out, err = python("-c", code)
    assert (status, out) == (3, "")
    assert "ZeroDivisionError" in err
    assert err.splitlines()[-1].startswith("error: this is a defect of weft, please report it")


@pytest.mark.parametrize(
    "command",
    [
        "merge",
        "inspect",
    ],
)
def test_hints_name_the_command_that_was_given(command: str) -> None:
    assert f"hint: weft {command} --help" in program(command, "--what")[2]


# -------------------------------------------------------------------------------- stdout and stderr


def one_object(out: str) -> dict[str, Any]:
    """The only thing on stdout."""
    found = json.loads(out)  # raises if anything comes before or after it
    assert isinstance(found, dict)
    assert found["schema"] == 1
    return found


def test_json_of_inspect() -> None:
    for name, kind in (("base", "base"), ("zip", "base"), ("adapter", "adapter")):
        code, out, err = program("inspect", GOOD / name, "--json")
        assert (code, err) == (0, "")
        assert one_object(out)["kind"] == kind


def test_inspect_of_what_weft_wrote(here: Path) -> None:
    """From what, when, by which version, and how much of the update is in it."""
    assert program("merge", GOOD / "base", GOOD / "adapter", GOOD / "adapter", "-o", "out")[0] == 0
    manifest = json.loads((here / "out/weft.json").read_text())
    survival = manifest["totals"]["survival"]
    text = program("inspect", "out")[1].splitlines()[-2:]
    assert text[0].startswith(f"merged by  weft 0.1.0 at {manifest['created']}, survival ")
    assert text[1] == f"from       {GOOD}/base + {GOOD}/adapter + {GOOD}/adapter"
    for path in ("out", "out/model.safetensors"):
        assert json.loads(program("inspect", path, "--json")[1])["origin"] == {
            "version": "0.1.0",
            "created": manifest["created"],
            "base": str(GOOD / "base"),
            "adapters": [str(GOOD / "adapter")] * 2,
            "survival": survival,
            "command": manifest["command"],
        }
    assert json.loads(program("inspect", GOOD / "base", "--json")[1])["origin"] is None


BROKEN = [
    *("", "[]", "null", "{}", "{", '{"tensors": []}', '{"tensors": {}}', "[" * 100_000),
    '{"tensors": {"layer.weight": 1, "other": 2}}',
]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:50] or "nothing")
def test_manifest_that_says_nothing(content: str, here: Path) -> None:
    """Of another program, or broken: the model is what it is without it."""
    shutil.copytree(GOOD / "base", here / "base")
    (here / "base/weft.json").write_text(content)
    found = weft.inspect(here / "base")
    assert isinstance(found, Checkpoint)
    assert found.origin is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("tensors", {}), ("inputs", []), ("inputs", [1]), ("inputs", 1)),
        *(("totals", None), ("totals", {"survival": "much"}), ("totals", {"survival": []})),
        ("inputs", [{"role": [], "file": "x"}]),
        ("inputs", [{"role": "base", "file": 1}]),
    ],
)
def test_manifest_that_was_edited(place: str, value: object, here: Path) -> None:
    weft.merge(GOOD / "base", GOOD / "adapter", output=here / "out")
    path = here / "out/weft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {place: value}))
    found = weft.inspect(here / "out")
    assert isinstance(found, Checkpoint)
    assert found.origin is None


def test_manifest_of_other_tensors(here: Path) -> None:
    """Somebody has put other weights into the folder: they are not what weft merged."""
    weft.merge(GOOD / "base", GOOD / "adapter", output=here / "out", dtype="bfloat16")
    (here / "out/model.safetensors").write_bytes((GOOD / "base/model.safetensors").read_bytes())
    found = weft.inspect(here / "out")
    assert isinstance(found, Checkpoint)
    assert found.origin is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_the_adapter_stands_for_it(name: str, here: Path) -> None:
    folder = GOOD / "adapter"
    for command in (["inspect"], ["inspect", "--json"]):
        code, shown, err = program(*command, folder / name)
        assert str(folder / name) in shown
        assert (code, shown.replace(str(folder / name), str(folder)), err) == program(
            *command, folder
        )
    code, _, err = program("merge", GOOD / "base", GOOD / "adapter" / name, "-o", "file")
    assert code == 0, err
    assert program(*MERGE)[0] == 0
    one, other = (here / n / "model.safetensors" for n in ("file", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_json_of_merge(here: Path) -> None:
    code, out, err = program(*MERGE, "--json")
    assert (code, err) == (0, "")
    found = one_object(out)
    assert set(found) == {"schema", "output", "seconds", "resumed", "manifest"}
    assert (found["output"], found["resumed"]) == ("out", 0)
    assert found["manifest"] == json.loads((here / "out/weft.json").read_text())
    assert found["seconds"] >= found["manifest"]["seconds"]


def test_json_of_dry_run(here: Path) -> None:
    code, out, err = program(*MERGE, "--json", "--dry-run")
    assert (code, err) == (0, "")
    found = one_object(out)
    assert found["operation"] == "merge"
    assert list(here.iterdir()) == []


def test_dry_run_and_merge_are_of_one_plan() -> None:
    planned = one_object(program(*MERGE, "--json", "--dry-run")[1])
    done = one_object(program(*MERGE, "--json")[1])["manifest"]
    assert planned["plan"] == done["plan"]
    assert set(planned["tensors"]) == set(done["tensors"])


def test_notes_and_quiet(here: Path) -> None:
    base = here / "base"
    base.mkdir()
    for name in ("model.safetensors", "config.json"):
        (base / name).write_bytes((GOOD / "base" / name).read_bytes())
    (base / "training.log").write_text("left out, which a note says")
    command = ["merge", base, GOOD / "adapter", "-o"]
    code, out, err = program(*command, "loud")
    assert code == 0
    assert "note: " in err
    assert len(out.splitlines()) == 3
    assert program(*command, "quiet", "-q") == (0, "", "")
    assert (here / "quiet/weft.json").exists()
    assert program(*command, "checked", "-q", "--dry-run") == (0, "", "")
    for more in ([], ["--dry-run"]):
        code, out, err = program(*command, "json", "-q", "--json", *more, "--force")
        assert (code, err) == (0, "")
        assert one_object(out)


def test_quiet_keeps_warnings(here: Path) -> None:
    """An update far below the base's precision is worth a word, whoever asked for silence."""
    import struct

    header = (GOOD / "base/model.safetensors").read_bytes()[:-80]
    base = here / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(header + struct.pack("<20f", *[1e30] * 20))
    command = ["merge", base, GOOD / "adapter", "-q"]
    code, out, err = program(*command, "-o", "out")
    assert (code, out) == (0, "")
    assert "warning: the output equals the base" in err
    assert "note: " not in err


def test_colour_and_width_do_not_change_the_text() -> None:
    plain = program("inspect", GOOD / "base")
    assert program("inspect", GOOD / "base", FORCE_COLOR="1", COLUMNS="20") == plain


def test_reader_that_leaves() -> None:
    """`weft inspect … | head -1`: no complaint, and no exit code of a failure."""
    for extra in ([], ["--json"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-m", "weft", "inspect", GOOD / "base", *extra],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminals_without_unicode(encoding: str, here: Path) -> None:
    """The merge is done by then; that ‖ cannot be printed does not undo it."""
    code, out, err = program(*MERGE, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert code == 0, err
    assert "1 of 2 tensors changed" in out
    assert (here / "out/model.safetensors").exists()


def test_as_a_library_and_as_a_program(here: Path) -> None:
    """Both do the same; the library prints nothing."""
    code = "import sys, weft; weft.merge(*sys.argv[1:3], output='library')"
    assert python("-c", code, GOOD / "base", GOOD / "adapter") == (0, "", "")
    program("merge", GOOD / "base", GOOD / "adapter", "-o", "program")
    one, other = (here / n / "model.safetensors" for n in ("library", "program"))
    assert one.read_bytes() == other.read_bytes()
    report = weft.merge(GOOD / "base", GOOD / "adapter", output=here / "again")
    assert report.totals.changed == 1


def test_reprs_are_short(here: Path) -> None:
    """For a notebook's last line: what it is, and not every tensor of it."""
    report = weft.merge(GOOD / "base", GOOD / "adapter", output=here / "out")
    plan = weft.plan_merge(GOOD / "base", GOOD / "adapter")
    for found in (report, plan, plan.plan, weft.inspect(here / "out"), plan.inputs.adapters[0][0]):
        text = repr(found).replace(str(GOOD), "").replace(str(here), "")
        assert len(text) < 800
        assert "TensorRef(" not in text
        assert "'dtype'" not in text  # of the manifest
    assert "survival=" in repr(report)
    assert "Checkpoint(given=" in repr(plan)
