"""What a benchmark runs on and against: the machine, and the peers' own environments."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

PEERS = {"peft": ["peft", "transformers"], "mergekit": ["mergekit==0.1.5"]}
PACKAGES = ("weft", "torch", "peft", "transformers", "mergekit", "safetensors")
VERSIONS = f"""
import json, platform
from importlib.metadata import distributions
found = {{d.name: d.version for d in distributions() if d.name in {PACKAGES}}}
print(json.dumps({{"python": platform.python_version(), **dict(sorted(found.items()))}}))
"""


def environment(folder: Path, peer: str) -> str:
    """The interpreter of a peer's environment, installed if it is not there."""
    python = str(folder / "bin" / "python")
    if not Path(python).exists() or peer not in versions(python):
        print(f"installing {peer} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for packages in (["torch==2.13.0"], PEERS[peer]):
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def versions(python: str) -> dict[str, str]:
    run = subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, text=True)
    return dict(json.loads(run.stdout))


def machine(folder: Path) -> dict[str, str | int | float]:
    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    df = subprocess.run(
        ["df", "--output=fstype", str(folder)], check=True, capture_output=True, text=True
    )
    return {
        "cpu": cpu.partition(":")[2].strip() or cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "kernel": platform.release(),
        "filesystem": df.stdout.split()[-1],
    }
