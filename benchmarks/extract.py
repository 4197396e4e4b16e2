"""Weft against MergeKit on extraction: whole processes, in turn, medians; and the exact optimum.

    python benchmarks/extract.py --rounds 3 --peer-rounds 1
    python benchmarks/extract.py --peer none --ranks 32

The pair is the base of `merge.py` (1.24 B parameters, bfloat16) and a fine-tune of it whose updates
have singular values that fall as 1/√i over 256 dimensions, before they are rounded to bfloat16. A
second pair, `--noise`, differs by nothing but noise: the worst case, in which no rank is better
than another. Results go to `results/extract.json`.

Of one matrix of each shape the factors are held against the exact SVD in float64. Ranks after the
first are run once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from merge import (
    BENCH,
    HERE,
    MB,
    WEFT,
    Sample,
    Verdict,
    execute,
    prepare,
    rss,
    save,
    wall,
    warm,
)
from safetensors import safe_open
from setting import environment

DIMENSIONS = 256
SHAPES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


def make_decaying(base: Path, folder: Path) -> None:
    """A fine-tune of `base`: ‖ΔW‖ is a twentieth of ‖W‖, and its spectrum falls as 1/√i."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base, partial)
    generator = torch.Generator().manual_seed(7)
    from weft.formats.safetensors import read_header

    for path in sorted(partial.glob("*.safetensors")):
        with path.open("r+b") as file:
            for ref in read_header(path).tensors:
                if len(ref.shape) < 2 or "embed" in ref.name:
                    continue
                file.seek(ref.start)
                raw = torch.frombuffer(bytearray(file.read(ref.nbytes)), dtype=torch.bfloat16)
                rows, columns = ref.shape
                left = torch.randn(rows, DIMENSIONS, generator=generator) / rows**0.5
                right = torch.randn(DIMENSIONS, columns, generator=generator) / columns**0.5
                falling = torch.arange(1, DIMENSIONS + 1) ** -0.5
                delta = (left * falling) @ right
                weight = raw.float().view(ref.shape)
                weight += delta * (0.05 * weight.norm() / delta.norm())
                raw.copy_(weight.flatten())
                file.seek(ref.start)
                file.write(raw.view(torch.uint8).numpy().data)
    partial.rename(folder)


def tensor(folder: Path, name: str) -> torch.Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118  (it is no mapping)
                return file.get_tensor(name).double()
    raise KeyError(name)


def excess(folder: Path, tuned: str, rank: int, spectra: dict[str, torch.Tensor]) -> float:
    """The worst ratio of ‖ΔW − BA‖ to the optimum, over one matrix of each shape of higher rank."""
    worst = 0.0
    for short in SHAPES:
        module = f"model.layers.3.{short}"
        weight = f"{module}.weight"
        delta = tensor(folder / tuned, weight) - tensor(folder / "base", weight)
        if short not in spectra:
            spectra[short] = torch.linalg.svdvals(delta)
        if rank >= len(spectra[short]):
            continue
        key = f"base_model.model.{module}"
        A, B = (tensor(folder / "out", f"{key}.lora_{x}.weight") for x in "AB")
        best = float(spectra[short][rank:].square().sum()) ** 0.5
        worst = max(worst, float((delta - B @ A).norm()) / best)
    return worst


def weft(tuned: str, rank: int) -> tuple[str, ...]:
    paths = (WEFT, "extract", tuned, "--base", "base", "-o", "out")
    # Where little is left out, rounding the factors to bfloat16 is more than that.
    dtype = ("--dtype", "float32") if rank > DIMENSIONS // 2 else ()
    return (*paths, "--rank", str(rank), *dtype, "-q")


def mergekit(python: str, folder: Path, tuned: str, rank: int) -> tuple[str, ...]:
    tool = str(Path(python).with_name("mergekit-extract-lora"))
    # By whole paths: offline, it dies at its end of a model that might be one of the hub.
    paths = ("--model", folder / tuned, "--base-model", folder / "base", "--out-path", "out")
    return (tool, *map(str, paths), "--max-rank", str(rank), "--no-write-model-card")


def measure(
    folder: Path, tuned: str, ranks: list[int], peer: str | None, rounds: int, peer_rounds: int
) -> tuple[dict[str, list[Sample]], dict[str, float]]:
    found: dict[str, list[Sample]] = {}
    ratios: dict[str, float] = {}
    spectra: dict[str, torch.Tensor] = {}
    for number in range(max(rounds, peer_rounds)):
        jobs: list[tuple[str, int, tuple[str, ...]]] = []
        if number < rounds:
            # A rank of hundreds takes minutes, and one run tells.
            own = ranks[:1] if number else ranks
            jobs += [(f"weft, rank {rank}", rank, weft(tuned, rank)) for rank in own]
        if peer and number < peer_rounds:
            jobs += [
                (f"mergekit, rank {ranks[0]}", ranks[0], mergekit(peer, folder, tuned, ranks[0]))
            ]
        for name, rank, command in jobs:
            warm(folder)
            took, memory, _ = execute(command, folder)
            found.setdefault(name, []).append(Sample(took, None, memory))
            if name not in ratios:
                ratios[name] = excess(folder, tuned, rank, spectra)
            shown = f"{took:.1f} s, {memory / MB:.0f} MB, {ratios[name]:.5f} x the optimum"
            print(f"round {number + 1}, {name}: {shown}", flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return found, ratios


def judge(
    samples: dict[str, list[Sample]], ratios: dict[str, float], ranks: list[int]
) -> list[Verdict]:
    ours, peer = samples[f"weft, rank {ranks[0]}"], samples.get(f"mergekit, rank {ranks[0]}")
    found = []
    if peer:
        times = wall(peer) / wall(ours)
        found.append(Verdict("rank 32: >= 25 x faster than mergekit", f"{times:.1f}", times >= 25))
        share = rss(ours) / rss(peer)
        found.append(Verdict("peak RSS <= 1/4 of mergekit's", f"{share:.2f}", share <= 0.25))
    for rank in ranks:
        ratio = ratios[f"weft, rank {rank}"]
        target = f"rank {rank}: error <= 1.002 x the optimum"
        found.append(Verdict(target, f"{ratio:.5f}", ratio <= 1.002))
        if rank != ranks[0] and peer:
            took, whole = wall(samples[f"weft, rank {rank}"]), wall(peer)
            # MergeKit always takes the full SVD: its time is the same for any rank.
            target = f"rank {rank}: not slower than the full SVD"
            found.append(Verdict(target, f"{took:.0f} s of {whole:.0f} s", took <= whole))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Weft against MergeKit on extraction.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=1)
    parser.add_argument("--ranks", default="32,256,1024")
    parser.add_argument("--noise", action="store_true", help="the pair that differs by noise alone")
    parser.add_argument("--size", default="1b", choices=("tiny", "1b"))
    parser.add_argument("--envs", type=Path, default=BENCH / "envs")
    parser.add_argument("--peer", help="an interpreter with MergeKit; `none` leaves it out")
    return parser.parse_args()


def main() -> None:
    options = parse()
    peer = options.peer or environment(options.envs / "mergekit", "mergekit")
    peer = None if peer == "none" else str(Path(peer).absolute())
    folder = prepare(options.size)
    tuned = "one" if options.noise else "decaying"
    if not (folder / tuned).exists():
        make_decaying(folder / "base", folder / tuned)
    ranks = [int(rank) for rank in options.ranks.split(",")]
    samples, ratios = measure(folder, tuned, ranks, peer, options.rounds, options.peer_rounds)
    verdicts = judge(samples, ratios, ranks)
    print()
    for name, found in samples.items():
        memory, ratio = rss(found) / MB, ratios[name]
        print(f"{name:20} {wall(found):8.1f} s {memory:8.0f} MB  {ratio:.5f} x the optimum")
    for verdict in verdicts:
        print(f"{'met   ' if verdict.met else 'MISSED'}  {verdict.target}: {verdict.measured}")
    result: dict[str, Any] = {
        "pair": tuned,
        "ratios": ratios,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "samples": {name: [asdict(s) for s in found] for name, found in samples.items()},
    }
    pythons = {"weft": sys.executable} | ({"mergekit": peer} if peer else {})
    name = "extract-noise" if options.noise else "extract"
    save(HERE / "results" / f"{name}.json", options, pythons, result)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
