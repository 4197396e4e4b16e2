"""Weft against MergeKit on recipes: whole processes, in turn, medians; and the plan of a 70B.

    python benchmarks/recipes.py --rounds 3 --peer-rounds 1
    python benchmarks/recipes.py --peer MERGEKIT_PYTHON --only ties,linear
    python benchmarks/recipes.py --size tiny

Models as in `merge.py`: a base of 1.24 B parameters in bfloat16, two full fine-tunes of it, and two
adapters, under `.bench/`. Times and memory are taken as there. MergeKit takes minutes for some of
the methods: `--peer-rounds` says how often it runs. Results go to `results/recipes-SIZE.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merge import (
    BENCH,
    HERE,
    MB,
    WEFT,
    Sample,
    Verdict,
    clean,
    execute,
    prepare,
    rss,
    save,
    wall,
    warm,
)
from merge import work as worked
from models import make_tuned
from setting import environment

# Method -> how many times faster than MergeKit the whole process has to be.
TARGETS = {
    "linear": 4,
    "slerp": 4,
    "ties": 12,
    "dare_ties": 8,
    "model_stock": 5,
    "della": 5,
}
LAYERS_70B, HIDDEN, INTERMEDIATE, VOCABULARY = 80, 8192, 28672, 128256


def recipe(method: str, one: str = "one", other: str = "two") -> dict[str, Any]:
    """The recipe of a method, of two models on the base."""
    weighted = {"weight": 0.5}
    if method in ("ties", "dare_ties", "della"):
        weighted["density"] = 0.5
    models: list[dict[str, Any]] = [
        {"model": one, "parameters": weighted},
        {"model": other, "parameters": weighted},
    ]
    found: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method == "slerp":
        return {**found, "base_model": one, "parameters": {"t": 0.5}}
    if method == "model_stock":
        models = [{"model": one}, {"model": other}]
        return {**found, "models": models, "base_model": "base"}
    return found if method == "linear" else {**found, "base_model": "base"}


def write_recipes(folder: Path) -> None:
    for method in TARGETS:
        (folder / f"{method}.yml").write_text(json.dumps(recipe(method)))  # JSON is YAML
        adapters = recipe(method, "base+all", "base+qv")
        (folder / f"{method}-lora.yml").write_text(json.dumps(adapters))


def sample(command: tuple[str, ...], folder: Path) -> Sample:
    """One process, with all models in the page cache."""
    warm(folder)
    took, memory, text = execute(command, folder)
    clean(folder)
    done = json.loads(text)["seconds"] if text.startswith("{") else None
    return Sample(took, done, memory)


def weft(name: str) -> tuple[str, ...]:
    return (WEFT, "run", f"{name}.yml", "-o", "out", "--json")


def mergekit(python: str, name: str) -> tuple[str, ...]:
    kit = str(Path(python).with_name("mergekit-yaml"))
    return (kit, f"{name}.yml", "out", "--no-write-model-card", "--no-copy-tokenizer")


def measure(
    folder: Path, methods: list[str], peer: str | None, rounds: int, peer_rounds: int
) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    copy = "cat base/*.safetensors one/*.safetensors > /dev/null && cp -r base out"
    for number in range(max(rounds, peer_rounds)):
        jobs: list[tuple[str, tuple[str, ...]]] = []
        if number < rounds:
            jobs.append(("read two, write one", ("sh", "-c", copy)))
            for method in methods:
                jobs.append((f"weft {method}", weft(method)))
                jobs.append((f"weft {method}, lora", weft(f"{method}-lora")))
        if peer and number < peer_rounds:
            jobs += [(f"mergekit {method}", mergekit(peer, method)) for method in methods]
        for name, command in jobs:
            found.setdefault(name, []).append(sample(command, folder))
            last = found[name][-1]
            print(
                f"round {number + 1}, {name}: {last.wall:.2f} s, {last.rss / MB:.0f} MB", flush=True
            )
    return found


def fabricate(folder: Path) -> None:
    """Three models of 70 B parameters: real headers, and sparse files behind them."""
    i, h, kv = INTERMEDIATE, HIDDEN, 1024
    layer = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (i, h),
        "mlp.up_proj": (i, h),
        "mlp.down_proj": (h, i),
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, h)}
    for n in range(LAYERS_70B):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (VOCABULARY, h)}
    config = json.loads((BENCH / "tiny" / "base" / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS_70B, "hidden_size": h, "tie_word_embeddings": False}
    for model in ("base", "one", "two"):
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY}))
        names, weight_map = list(shapes), {}
        for number in range(30):
            file = f"model-{number + 1:05}-of-00030.safetensors"
            header, at = {}, 0
            for name in names[number::30]:
                count = 2
                for size in shapes[name]:
                    count *= size
                offsets = [at, at + count]
                header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": offsets}
                weight_map[name], at = file, at + count
            text = json.dumps(header).encode()
            with (folder / model / file).open("wb") as out:
                out.write(struct.pack("<Q", len(text)) + text)
                out.truncate(8 + len(text) + at)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index))
    models = [{"model": m, "parameters": {"weight": 0.5, "density": 0.5}} for m in ("one", "two")]
    found = {"merge_method": "ties", "models": models, "base_model": "base", "dtype": "bfloat16"}
    (folder / "ties.yml").write_text(json.dumps(found))


def measure_plan(rounds: int) -> list[Sample]:
    """`weft run --check` of a TIES of three models of 70 B parameters."""
    folder = BENCH / "70b"
    shutil.rmtree(folder, ignore_errors=True)
    fabricate(folder)
    found = [execute((WEFT, "run", "ties.yml", "--check"), folder)[:2] for _ in range(rounds + 1)]
    shutil.rmtree(folder)
    return [Sample(took, None, memory) for took, memory in found[1:]]


def judge(samples: dict[str, list[Sample]], methods: list[str]) -> list[Verdict]:
    found = []
    for method in methods:
        ours, peer = samples[f"weft {method}"], samples.get(f"mergekit {method}")
        if peer:
            times = wall(peer) / wall(ours)
            limit = TARGETS[method]
            found.append(
                Verdict(
                    f"{method} >= {limit} x faster than mergekit", f"{times:.1f}", times >= limit
                )
            )
        times = wall(samples[f"weft {method}, lora"]) / wall(ours)
        found.append(
            Verdict(f"{method} of adapters <= 1.3 x of models", f"{times:.2f}", times <= 1.3)
        )
        memory = max(rss(ours), rss(samples[f"weft {method}, lora"])) / MB
        found.append(Verdict(f"{method} peak RSS <= 1 GB", f"{memory:.0f} MB", memory <= 1000))
    if "linear" in methods:
        times = (worked(samples["weft linear"]) or 0.0) / wall(samples["read two, write one"])
        found.append(Verdict("linear's work <= 2.5 x cat and cp", f"{times:.2f}", times <= 2.5))
    took = wall(samples["plan of 70B"])
    found.append(Verdict("plan of a 70B, 3-model TIES <= 2 s", f"{took:.2f} s", took <= 2))
    return found


def table(samples: dict[str, list[Sample]]) -> str:
    rows = [["", "process", "work", "peak RSS"]]
    for name, found in samples.items():
        done = worked(found)
        shown = f"{done:.2f} s" if done is not None else ""
        rows.append([name, f"{wall(found):.2f} s", shown, f"{rss(found) / MB:.0f} MB"])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ([name.ljust(first), *map(str.rjust, cells, others)] for name, *cells in rows)
    return "\n".join("  ".join(line) for line in lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Weft against MergeKit on recipes.")
    parser.add_argument("--size", default="1b", choices=("tiny", "1b"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=1)
    parser.add_argument("--only", help="methods, with commas between")
    parser.add_argument("--envs", type=Path, default=BENCH / "envs")
    parser.add_argument("--peer", help="an interpreter with MergeKit; `none` leaves it out")
    return parser.parse_args()


def main() -> None:
    options = parse()
    peer = options.peer or environment(options.envs / "mergekit", "mergekit")
    peer = None if peer == "none" else str(Path(peer).absolute())
    methods = options.only.split(",") if options.only else list(TARGETS)
    prepare("tiny")
    folder = prepare(options.size)
    for seed, name in enumerate(("one", "two"), 1):
        if not (folder / name).exists():
            make_tuned(folder / "base", folder / name, seed)
    write_recipes(folder)
    begin = time.perf_counter()
    samples = measure(folder, methods, peer, options.rounds, options.peer_rounds)
    samples["plan of 70B"] = measure_plan(options.rounds)
    verdicts = judge(samples, methods)
    print(f"\n{table(samples)}\n\n{time.perf_counter() - begin:.0f} s in all\n")
    for verdict in verdicts:
        print(f"{'met   ' if verdict.met else 'MISSED'}  {verdict.target}: {verdict.measured}")
    result = {
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "samples": {name: [asdict(s) for s in found] for name, found in samples.items()},
    }
    path = HERE / "results" / f"recipes-{options.size}.json"
    pythons = {"weft": sys.executable} | ({"mergekit": peer} if peer else {})
    save(path, options, pythons, result)


if __name__ == "__main__":
    main()
