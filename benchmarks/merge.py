"""Weft against cp, PEFT and MergeKit: whole processes, in turn, several rounds, medians.

    python benchmarks/merge.py --size 1b --rounds 5
    python benchmarks/merge.py --size 1b --rounds 5 --memory-8b
    python benchmarks/merge.py --size tiny --peers PEFT_PYTHON MERGEKIT_PYTHON

The checkpoints and the peers' environments are made once, under `.bench/`; `--envs` looks for the
environments (peft/ and mergekit/) elsewhere, `--peers` takes two interpreters that are there, and
`--peers` alone leaves the peers out. Results go to `benchmarks/results/merge-SIZE.json`.

How it measures: every command first runs once on the tiny model, and every input is read once, so
that all find a warm page cache. Each round runs all of them, beginning with another one. Before a
run come a copy that does not count, so that all find the same memory at hand, and a sync. When the
clock has stopped, the output is compared with the base and deleted: other changed tensors than the
adapter's are an error. Weft's output is on the disk when it ends (fsync), that of the others is
not: see the row `cp -r, sync`.

- process: wall time of the whole process, start-up and imports included.
- work: what the program itself measured, without start-up and imports. For Weft it is `seconds`
  of `--json`, from the first header to the last rename, the flush to disk included.
- peak RSS: of the process, by wait4. It counts pages of mapped files, as PEFT's loader maps them.

Stdlib only: the peak RSS that Linux reports of a child is never below that of its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from setting import PEERS, environment, machine, versions
from tensors import changed, spans

HERE = Path(__file__).absolute().parent
BENCH = HERE.parent / ".bench"
WEFT = str(Path(sys.executable).with_name("weft"))
MB = 1e6
QV = ("q_proj", "v_proj")
LINEAR = (*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HELP_TORCH = """
import atexit, sys
from weft.cli.app import main
atexit.register(lambda: print("torch" in sys.modules))
main(["--help"])
"""


@dataclass(frozen=True)
class Run:
    """A command that turns `base` into `out`, and the modules whose weights must differ then."""

    name: str
    command: tuple[str, ...]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One process: wall and work in seconds, peak RSS in bytes."""

    wall: float
    work: float | None
    rss: int


@dataclass(frozen=True)
class Verdict:
    """A target, what was measured, and whether it is met."""

    target: str
    measured: str
    met: bool


# A process begins with the peak of the one that started it: so a small one does.
LAUNCH = """
import os, subprocess, sys, time
begin = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    print(time.perf_counter() - begin, usage.ru_maxrss * 1024, file=file)
os._exit(os.waitstatus_to_exitcode(status) & 255)
"""


def execute(command: tuple[str, ...], folder: Path) -> tuple[float, int, str]:
    """Wall time, peak RSS and stdout of a process; its failure ends the benchmark."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.NamedTemporaryFile("r") as measured:
        launch = (sys.executable, "-S", "-c", LAUNCH, measured.name, *command)
        done = subprocess.run(launch, cwd=folder, capture_output=True, text=True, env=env)
        if done.returncode:
            complaint = done.stderr[-2000:]
            sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{complaint}")
        wall, peak = measured.read().split()
    return float(wall), int(peak), done.stdout


def sample(run: Run, folder: Path) -> Sample:
    """Run it, check what it wrote, and delete that."""
    warm(folder)
    wall, rss, text = execute(run.command, folder)
    found = changed(folder / "base", folder / "out")
    expected = {name for name in spans(folder / "base") if name.split(".")[-2] in run.changes}
    if found != expected:
        sys.exit(f"{run.name} changed {len(found)} tensors, its adapter has {len(expected)}")
    clean(folder)
    work = json.loads(text)["seconds"] if text.startswith("{") else None
    return Sample(wall, work, rss)


def warm(folder: Path) -> None:
    """Make the machine the same for whoever is next.

    A virtual machine gives freed memory back to its host, and getting it again costs seconds: a
    copy that does not count leaves the same pages at hand. Files that nobody reads for minutes
    leave the page cache too: all models are read.
    """
    clean(folder)
    shutil.copytree(folder / "base", folder / "out")
    clean(folder)
    os.sync()
    for path in sorted(folder.glob("*/*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def clean(folder: Path) -> None:
    for name in ("out", "out.partial", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)


def prepare(size: str) -> Path:
    """The folder of the checkpoint and its adapters, made if it is not there, and read once."""
    folder = BENCH / size
    if not folder.exists():
        print(f"making {size} …", flush=True)
        BENCH.mkdir(exist_ok=True)
        models = str(HERE / "models.py")
        subprocess.run([sys.executable, models, size, str(folder)], check=True)
    merge = {"merge_method": "passthrough", "models": [{"model": "base+all"}], "dtype": "bfloat16"}
    (folder / "mergekit.yaml").write_text(json.dumps(merge))  # JSON is YAML
    clean(folder)
    for path in folder.glob("*/*.safetensors"):
        with path.open("rb") as file:
            while file.read(2**20):
                pass
    return folder


def weft(name: str, adapter: str, changes: tuple[str, ...]) -> Run:
    return Run(name, (WEFT, "merge", "base", adapter, "-o", "out", "--json"), changes)


def runs(peers: list[str]) -> list[Run]:
    """What is timed on the main model; MergeKit keeps the merged LoRA in `cache`."""
    sync = "cp -r base out && sync out/* out"
    found = [
        Run("cp -r", ("cp", "-r", "base", "out")),
        Run("cp -r, sync", ("sh", "-c", sync)),
        weft("weft, all linear", "all", LINEAR),
        weft("weft, q and v", "qv", QV),
    ]
    if peers:
        script = str(HERE / "peers" / "peft_merge.py")
        found.append(Run("peft", (peers[0], script, "base", "all", "out"), LINEAR))
        kit = str(Path(peers[1]).with_name("mergekit-yaml"))
        options = ("--lora-merge-cache", "cache", "--no-write-model-card", "--no-copy-tokenizer")
        found.append(Run("mergekit", (kit, "mergekit.yaml", "out", *options), LINEAR))
    return found


def measure(folder: Path, runs: list[Run], rounds: int) -> dict[str, list[Sample]]:
    """Every run once per round; another one begins each round."""
    found: dict[str, list[Sample]] = {run.name: [] for run in runs}
    for number in range(rounds):
        first = number % len(runs)
        for run in [*runs[first:], *runs[:first]]:
            found[run.name].append(sample(run, folder))
            print(f"round {number + 1}, {run.name}: {found[run.name][-1].wall:.2f} s", flush=True)
    return found


def measure_start(folder: Path, rounds: int) -> dict[str, list[Sample]]:
    """The commands that must answer at once."""
    commands = {"weft --help": (WEFT, "--help"), "weft inspect": (WEFT, "inspect", "base")}
    found: dict[str, list[Sample]] = {}
    for name, command in commands.items():
        times = [execute(command, folder)[:2] for _ in range(rounds + 1)][1:]
        found[name] = [Sample(wall, None, rss) for wall, rss in times]
    return found


def table(samples: dict[str, list[Sample]], compared: set[str]) -> str:
    """Aligned text; `x cp` and `x weft` say how many times the time of cp and of Weft it took."""
    cp, ours = wall(samples["cp -r"]), wall(samples["weft, all linear"])
    rows = [["", "process", "min", "x cp", "x weft", "work", "x cp", "peak RSS"]]
    for name, found in samples.items():
        took, done = wall(found), work(found)
        row = [name, f"{took:.2f} s", f"{min(s.wall for s in found):.2f} s"]
        row += [f"{took / cp:.2f}", f"{took / ours:.2f}"] if name in compared else ["", ""]
        row += [f"{done:.2f} s"] if done is not None else [""]
        row += [f"{done / cp:.2f}"] if done is not None and name in compared else [""]
        rows.append([*row, f"{rss(found) / MB:.0f} MB"])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ([name.ljust(first), *map(str.rjust, cells, others)] for name, *cells in rows)
    return "\n".join("  ".join(line) for line in lines)


def wall(found: list[Sample]) -> float:
    return median(s.wall for s in found)


def work(found: list[Sample]) -> float | None:
    times = [s.work for s in found if s.work is not None]
    return median(times) if times else None


def rss(found: list[Sample]) -> int:
    return max(s.rss for s in found)


def judge(samples: dict[str, list[Sample]], torch: bool) -> list[Verdict]:
    """A verdict per target that could be measured."""
    cp, ours, qv = (samples[name] for name in ("cp -r", "weft, all linear", "weft, q and v"))
    found = []
    for peer in PEERS:
        if peer in samples:
            times = wall(samples[peer]) / wall(ours)
            found.append(Verdict(f"process >= 5 x faster than {peer}", f"{times:.2f}", times >= 5))
    for name, run, limit in (("all-linear", ours, 2.0), ("q and v", qv, 1.3)):
        times = (work(run) or 0.0) / wall(cp)
        found.append(Verdict(f"{name} work <= {limit} x cp -r", f"{times:.2f}", times <= limit))
    memory = rss(ours) / MB
    found.append(Verdict("peak RSS <= 700 MB", f"{memory:.0f} MB", memory <= 700))
    if "weft, 8b" in samples:
        times = rss(samples["weft, 8b"]) / rss(ours)
        found.append(Verdict("8b peak RSS <= 1.05 x this", f"{times:.2f}", times <= 1.05))
    took = wall(samples["weft --help"])
    shown = f"{took:.2f} s, torch {'loaded' if torch else 'not loaded'}"
    found.append(Verdict("--help <= 0.4 s without torch", shown, took <= 0.4 and not torch))
    took = wall(samples["weft inspect"])
    found.append(Verdict("inspect <= 1 s", f"{took:.2f} s", took <= 1))
    return found


def save(
    path: Path, options: argparse.Namespace, pythons: dict[str, str], result: dict[str, Any]
) -> None:
    """Every sample, and what they were taken on and with."""
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "size": options.size,
        "rounds": options.rounds,
        "machine": machine(BENCH),
        "versions": {name: versions(python) for name, python in pythons.items()},
        **result,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Weft against cp, PEFT and MergeKit.")
    parser.add_argument("--size", default="1b", choices=("tiny", "1b", "8b"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-8b", action="store_true", help="the peak RSS on 5 GB, too")
    parser.add_argument("--envs", type=Path, default=BENCH / "envs")
    parser.add_argument("--peers", nargs="*", help="interpreters with PEFT and with MergeKit")
    options = parser.parse_args()
    if options.rounds < 1 or len(options.peers or ()) not in (0, 2):
        parser.error("one round at least, and no peer or two")
    return options


def main() -> None:
    options = parse()
    peers = options.peers
    if peers is None:
        peers = [environment(options.envs / peer, peer) for peer in PEERS]
    peers = [str(Path(peer).absolute()) for peer in peers]
    listed = runs(peers)
    measure(prepare("tiny"), listed, 1)  # so that every program is in the page cache
    folder = prepare(options.size)
    sample(listed[0], folder)  # the first to write that much may be slower: not counted
    samples = measure(folder, listed, options.rounds) | measure_start(folder, options.rounds)
    if options.memory_8b and shutil.disk_usage(BENCH).free < 16e9:
        print("8b left out: it takes 16 GB of disk")
    elif options.memory_8b:
        large = [weft("weft, 8b", "all", LINEAR)]
        samples |= measure(prepare("8b"), large, min(options.rounds, 3))
    torch = execute((sys.executable, "-c", HELP_TORCH), folder)[2].split()[-1] == "True"
    verdicts = judge(samples, torch)
    print(f"\n{table(samples, {run.name for run in listed})}\n")
    if options.size != "1b":
        print("the targets are those of 1b:")
    for verdict in verdicts:
        print(f"{'met   ' if verdict.met else 'MISSED'}  {verdict.target}: {verdict.measured}")
    result = {
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "samples": {name: [asdict(s) for s in found] for name, found in samples.items()},
    }
    pythons = dict(zip(("weft", *PEERS), [sys.executable, *peers], strict=False))
    save(HERE / "results" / f"merge-{options.size}.json", options, pythons, result)


if __name__ == "__main__":
    main()
