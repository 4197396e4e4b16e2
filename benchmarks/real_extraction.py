"""A real fine-tune, extracted at several ranks: what of it the merged-back model still says.

    python benchmarks/real_extraction.py
    python benchmarks/real_extraction.py --peer MERGEKIT_PYTHON

SmolLM2-135M-Instruct, tuned in full (`finetune.py`, once, under `.bench/`), is extracted by Weft
and by MergeKit. Each adapter is merged back into the base without rounding: Weft's by `weft merge
--dtype float32`, MergeKit's by PEFT into a base in float32. Measured on the merged-back model:

- kept: 1 − Σ‖merged − tuned‖² / Σ‖tuned − base‖² over all tensors of the model, in float64.
- KL: the mean over all positions of the held-out text of KL(tuned ‖ merged) of the next token's
  distribution, in nats; float32, windows of 512 tokens.
- same: positions at which both would say the same token.
- wall: of the extracting process, start-up included; one run, inputs in the page cache.

`--peer` takes an interpreter that has MergeKit, and alone leaves it out. Results go to
`results/real-extraction.json` and the plot to `docs/images/real-extraction.svg`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from chart import Series, chart
from finetune import BENCH, HELD_OUT, HERE, finetune
from merge import MB, WEFT, execute
from peft import PeftModel
from safetensors import safe_open
from setting import environment, machine, versions
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.demo.model import smollm2

WORK = BENCH / "real-extraction"
FOUND = WORK / "found.json"
PLOT = HERE.parent / "docs" / "images" / "real-extraction.svg"
RANKS, SHARED_RANKS = (4, 8, 16, 32, 64), (4, 16, 64)
WINDOW = 512


@dataclass(frozen=True)
class Run:
    """One extraction; `series` and `label` name it in the plot."""

    series: str
    label: str
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the table and the results call it."""
        return f"{self.series}, {self.label}"


@dataclass(frozen=True)
class Found:
    """What came of a run; `told` is the relative error that weft.json states."""

    ranks: tuple[int, int, int]  # least, median, most
    saved: int
    size: int
    wall: float
    kept: float
    error: float
    told: float | None
    kl: float
    same: float


class Judge:
    """Compares models with the tuned one, on its weights and on the held-out text."""

    def __init__(self, base: Path, tuned: Path) -> None:
        """Keeps the tuned model's distributions: tokens × vocabulary in float32."""
        text = HELD_OUT.read_text(encoding="utf-8")
        self.tokens = torch.tensor(AutoTokenizer.from_pretrained(base).encode(text))
        model = load(tuned)
        self.tied = model.config.tie_word_embeddings
        self.weights = {name: value.clone() for name, value in self.named(model)}
        self.expected = self.distributions(model)
        self.change = self.distance(load(base))

    def named(self, model: Any) -> list[tuple[str, torch.Tensor]]:
        """The weights, a tied head only under the embedding's name."""
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if self.tied and not torch.equal(head.weight, table.weight):
            raise SystemExit("the merged model's head no longer equals its embedding")
        skipped = "lm_head.weight" if self.tied else None
        return [(name, value) for name, value in model.state_dict().items() if name != skipped]

    def distance(self, model: Any) -> float:
        """‖model − tuned‖_F² over all tensors."""
        pairs = [(value, self.weights[name]) for name, value in self.named(model)]
        if len(pairs) != len(self.weights):
            raise SystemExit(f"{len(pairs)} tensors where the tuned model has {len(self.weights)}")
        return sum((one.double() - other.double()).square().sum().item() for one, other in pairs)

    @torch.inference_mode()
    def distributions(self, model: Any) -> torch.Tensor:
        """The logarithms of p(next token) at each position of the held-out text."""
        windows = self.tokens.split(WINDOW)
        return torch.cat([model(row[None]).logits[0].log_softmax(-1) for row in windows])

    def speech(self, model: Any) -> tuple[float, float]:
        """As `compare`, of what the model says on the held-out text."""
        return self.compare(self.distributions(model))

    def compare(self, got: torch.Tensor) -> tuple[float, float]:
        """Mean KL(tuned ‖ got), and the share of positions with the same likeliest token."""
        wanted = self.expected
        same = (got.argmax(-1) == wanted.argmax(-1)).double().mean().item()
        each = [
            functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
            for q, p in zip(got.split(WINDOW), wanted.split(WINDOW), strict=True)
        ]
        return torch.cat(each).double().mean().item(), same

    def loss(self, distributions: torch.Tensor) -> float:
        """Cross-entropy on the text itself."""
        ends = torch.arange(len(self.tokens) - 1)
        inside = ends[(ends + 1) % WINDOW != 0]
        return -distributions[inside, self.tokens[inside + 1]].double().mean().item()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def runs(base: Path, tuned: Path, peer: str | None) -> list[Run]:
    """Weft with its defaults and with the embedding decomposed, too, and MergeKit."""
    weft = (WEFT, "extract", str(tuned), "--base", str(base), "-o", "adapter", "--json")
    found = [Run("weft", f"rank {rank}", (*weft, "--rank", str(rank))) for rank in RANKS]
    found.append(Run("weft", "auto", (*weft, "--rank", "auto")))
    found.append(Run("weft", "energy 0.9", (*weft, "--energy", "0.9")))
    for rank in SHARED_RANKS:
        whole = (*weft, "--rank", str(rank), "--embed", "lora")
        found.append(Run("weft --embed lora", f"rank {rank}", whole))
    if peer:
        kit = str(Path(peer).with_name("mergekit-extract-lora"))
        files = ("--model", str(tuned), "--base-model", str(base), "--out-path", "adapter")
        extract = (kit, *files, "--max-rank")
        found += [Run("mergekit", f"rank {rank}", (*extract, str(rank))) for rank in SHARED_RANKS]
    return found


def measure(run: Run, base: Path, judge: Judge) -> Found:
    """Extract, merge back, compare, and delete."""
    clean()
    adapter = WORK / "adapter"
    wall, _, _ = execute(run.command, WORK)
    told = None
    if run.command[0] == WEFT:
        told = json.loads((adapter / "weft.json").read_text())["totals"]["relative_error"]
        merged = ("merged", "--dtype", "float32", "-q")
        execute((WEFT, "merge", str(base), "adapter", "-o", *merged), WORK)
        model = load(WORK / "merged")
    else:
        model = PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload()
    lost = judge.distance(model) / judge.change
    kl, same = judge.speech(model)
    ranks, saved, size = shape(adapter)
    clean()
    return Found(ranks, saved, size, wall, 1 - lost, lost**0.5, told, kl, same)


def earlier(tuned: Path) -> dict[str, Found]:
    """What an interrupted run found on this tuned model."""
    kept = json.loads(FOUND.read_text()) if FOUND.exists() else {"tuned": None}
    if kept["tuned"] != tuned.name:
        return {}
    return {name: Found(**one) for name, one in kept["runs"].items()}


def clean() -> None:
    for name in ("adapter", "merged"):
        shutil.rmtree(WORK / name, ignore_errors=True)


def shape(adapter: Path) -> tuple[tuple[int, int, int], int, int]:
    """Least, median and greatest rank; tensors saved in full; bytes."""
    path = adapter / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    ranks = [s[0] for name, s in shapes.items() if "lora_A" in name or "lora_embedding_A" in name]
    return (
        (min(ranks), round(median(ranks)), max(ranks)),
        len(shapes) - 2 * len(ranks),
        path.stat().st_size,
    )


def table(found: dict[str, Found], nothing: float, same: float) -> str:
    lines = [f"{'':26} {'ranks':>12} {'size':>9} {'kept':>7} {'KL':>9} {'same':>7} {'wall':>8}"]
    for name, one in found.items():
        least, middle, most = one.ranks
        ranks = str(least) if least == most else f"{least}–{middle}–{most}"
        lines.append(
            f"{name:26} {ranks:>12} {one.size / MB:6.1f} MB {one.kept:7.2%} {one.kl:9.2e} "
            f"{one.same:7.2%} {one.wall:6.1f} s"
        )
    lines.append(f"{'the base itself':26} {'':12} {'':9} {0:7.2%} {nothing:9.2e} {same:7.2%}")
    return "\n".join(lines)


def plot(listed: list[Run], found: dict[str, Found], nothing: float) -> str:
    def points(name: str, *, ranked: bool = True) -> tuple[tuple[float, float, str], ...]:
        chosen = [r for r in listed if r.series == name and r.label.startswith("rank") == ranked]
        placed = [(found[run.name], run.label.removeprefix("rank ")) for run in chosen]
        return tuple((one.size / MB, one.kl, label) for one, label in placed)

    series = [
        Series("weft extract --rank", "#0b6e99", points("weft")),
        Series("weft extract, other rules", "#7a3e9d", points("weft", ranked=False), joined=False),
        Series("weft extract --embed lora", "#2e8b57", points("weft --embed lora")),
        Series("mergekit-extract-lora", "#c2571a", points("mergekit"), hollow=True),
    ]
    return chart(
        "SmolLM2-135M tuned in full: adapter size and distance from the tuned model",
        "adapter, MB",
        "KL(tuned ‖ merged back), nats per token",
        [one for one in series if one.points],
        (nothing, "the base, without adapter"),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Extraction from a real fine-tune.")
    parser.add_argument("--peer", nargs="?", const="", help="an interpreter that has MergeKit")
    parser.add_argument("--resume", action="store_true", help="keep what a broken run found")
    return parser.parse_args()


def main() -> None:
    options = parse()
    peer = options.peer
    if peer is None:
        peer = environment(BENCH / "envs" / "mergekit", "mergekit")
    peer = str(Path(peer).absolute()) if peer else None
    torch.set_num_threads(2)
    base, tuned = smollm2(), finetune()
    WORK.mkdir(parents=True, exist_ok=True)
    listed = runs(base, tuned, peer)
    judge = Judge(base, tuned)
    model = load(base)
    heard = judge.distributions(model)
    nothing, same = judge.compare(heard)
    losses = {"base": judge.loss(heard), "tuned": judge.loss(judge.expected)}
    del model, heard
    count = len(judge.tokens)
    print(f"{count} held-out tokens, loss {losses['base']:.3f} → {losses['tuned']:.3f}", flush=True)
    for tool in {run.command[0] for run in listed}:
        execute((tool, "--help"), WORK)  # so that every program is in the page cache
    found = earlier(tuned) if options.resume else {}
    for run in listed:
        if run.name not in found:
            found[run.name] = measure(run, base, judge)
            print(f"{run.name}: KL {found[run.name].kl:.2e}", flush=True)
            kept = {"tuned": tuned.name, "runs": {name: asdict(f) for name, f in found.items()}}
            FOUND.write_text(json.dumps(kept))
    print(f"\n{table(found, nothing, same)}")
    off = max(abs(one.told / one.error - 1) for one in found.values() if one.told)
    print(f"\nthe error in weft.json is the measured one to {off:.1e} of it")
    pythons = {"weft": sys.executable, **({"mergekit": peer} if peer else {})}
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(BENCH),
        "versions": {name: versions(python) for name, python in pythons.items()},
        "tuning": json.loads((tuned / "finetune.json").read_text()),
        "held_out": {"tokens": count, "loss": losses, "base_kl": nothing, "base_same": same},
        "runs": {name: asdict(one) for name, one in found.items()},
    }
    result = HERE / "results" / "real-extraction.json"
    result.write_text(json.dumps(content, indent=1) + "\n")
    PLOT.parent.mkdir(exist_ok=True)
    PLOT.write_text(plot(listed, found, nothing), encoding="utf-8")


if __name__ == "__main__":
    main()
