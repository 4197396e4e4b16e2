"""What each kind of adapter costs, as a ratio to plain LoRA on the same base.

    python benchmarks/kinds.py
    python benchmarks/kinds.py --kinds dora oft --rounds 5

A base of two layers (q 2048 × 2048, up 8192 × 2048, down 2048 × 8192; 76 M parameters, bfloat16)
and an adapter of every kind with PEFT's usual settings, made by PEFT with random values. Each round
merges all of them in turn, LoRA before each; the ratio is that of the medians of `seconds`, the
work from the first header to the last rename. Prints a table, and writes
`benchmarks/results/kinds.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import save_file
from setting import machine, versions
from torch import nn

import weft

HERE = Path(__file__).absolute().parent
SHAPES = {"q": (2048, 2048), "up": (8192, 2048), "down": (2048, 8192)}
LAYERS = 2
RANK = 16
TARGETS = list(SHAPES)

KINDS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=RANK, target_modules=TARGETS),
    "kasa": lambda: peft.LoraConfig(r=RANK, target_modules=TARGETS, kasa_config=KasaConfig()),
    "bdlora": lambda: peft.LoraConfig(
        r=RANK,
        target_modules=TARGETS,
        use_bdlora=BdLoraConfig(
            target_modules_bd_a=["q", "up"], target_modules_bd_b=["down"], nblocks=4
        ),
    ),
    "dora": lambda: peft.LoraConfig(r=RANK, target_modules=TARGETS, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=RANK, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=RANK, target_modules=TARGETS),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=RANK, target_r=8, total_step=10, target_modules=TARGETS
    ),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down"]),
    "vera": lambda: peft.VeraConfig(r=64, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, target_modules=TARGETS),
    "boft": lambda: peft.BOFTConfig(
        boft_block_size=32, boft_n_butterfly_factor=2, target_modules=TARGETS
    ),
    "hra": lambda: peft.HRAConfig(r=8, target_modules=TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=1000, target_modules=TARGETS),
    "vblora": lambda: peft.VBLoRAConfig(num_vectors=256, vector_length=256, target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=32, target_modules=TARGETS),
    "shira": lambda: peft.ShiraConfig(r=RANK, target_modules=TARGETS),
    "c3a": lambda: peft.C3AConfig(block_size=128, target_modules=TARGETS),
    "delora": lambda: peft.DeloraConfig(r=RANK, target_modules=TARGETS),
    "gralora": lambda: peft.GraloraConfig(r=RANK, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(r=64, target_modules=TARGETS),
    "miss-bat": lambda: peft.MissConfig(r=64, init_weights="bat", target_modules=TARGETS),
    "hira": lambda: peft.HiraConfig(r=RANK, target_modules=TARGETS),
    "road": lambda: peft.RoadConfig(target_modules=TARGETS),
    "wavelet": lambda: peft.WaveFTConfig(n_frequency=1000, target_modules=TARGETS),
    "pvera": lambda: peft.PveraConfig(r=64, target_modules=TARGETS),
    "deft": lambda: peft.DeftConfig(r=RANK, target_modules=TARGETS),
    "glora": lambda: peft.GloraConfig(r=RANK, target_modules=TARGETS),
    "peanut": lambda: peft.PeanutConfig(r=RANK, target_modules=TARGETS),
    "osf": lambda: peft.OSFConfig(effective_rank=RANK, target_modules=TARGETS),
    "tinylora": lambda: peft.TinyLoraConfig(
        r=2, u=64, save_projection=True, target_modules=TARGETS
    ),
    "unilora": lambda: peft.UniLoraConfig(
        r=4, theta_d_length=256, save_indices=True, target_modules=TARGETS
    ),
    "supertuning": lambda: peft.SupertuningConfig(sparsity=0.99, target_modules=TARGETS),
    "frod": lambda: peft.FrodConfig(
        save_projection=True, progressbar=False, target_modules=TARGETS
    ),
}
# They change vectors, or a few rows: nothing that takes time.
SMALL = {"BEFT", "LN_TUNING", "TRAINABLE_TOKENS"}


class Base(nn.Module):
    """Linear layers under the names that the checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(s[1], s[0], bias=False) for n, s in SHAPES.items()})
            for _ in range(LAYERS)
        )


def make(folder: Path, names: list[str]) -> list[str]:
    """Write the base and an adapter per kind; -> the kinds that there are."""
    torch.manual_seed(0)
    base = Base().bfloat16()
    (folder / "base").mkdir()
    save_file(base.state_dict(), folder / "base" / "model.safetensors", {"format": "pt"})
    made = []
    for name in names:
        torch.manual_seed(0)
        model = peft.get_peft_model(Base().bfloat16(), KINDS[name]())
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(0.01 * torch.randn(value.shape))
        model.save_pretrained(folder / name)
        made.append(name)
    return made


def measure(folder: Path, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Kind -> seconds of work, of LoRA beside it, and their ratio."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name in names:
            for kind in ("lora", name):
                out = folder / "out"
                report = weft.merge(folder / "base", folder / kind, output=out)
                seconds[f"{name}/{kind}"].append(report.seconds)
                shutil.rmtree(out)
    found = {}
    for name in names:
        own, lora = median(seconds[f"{name}/{name}"]), median(seconds[f"{name}/lora"])
        found[name] = {"seconds": own, "lora": lora, "ratio": own / lora}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = list(dict.fromkeys(["lora", *options.kinds]))
    with tempfile.TemporaryDirectory(dir=HERE.parent) as folder:
        made = make(Path(folder), names)
        found = measure(Path(folder), made, options.rounds)
    print(f"{'kind':12}{'seconds':>9}{'x LoRA':>8}")
    for name, row in sorted(found.items(), key=lambda item: item[1]["ratio"]):
        print(f"{name:12}{row['seconds']:9.3f}{row['ratio']:8.2f}")
    result = {
        "machine": machine(HERE),
        "versions": versions(sys.executable),
        "rounds": options.rounds,
        "kinds": found,
    }
    (HERE / "results" / "kinds.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
