"""Makes the corpus: adapters as several releases of PEFT write them, each in its own environment.

    make corpus                          # every release
    python tests/corpus/make.py 0.21.2   # one of them, and those that were not made yet

All of these releases run with the torch of `constraints.txt`, none had to be left out. The
environments, 3 GB together, are in `.bench/corpus-envs/`; torch is in one of them, and the others
look into it. What they write goes into `.bench/corpus/`, and what is worth keeping of it into an
archive for each release, with an index beside it. A second run makes the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from archive import pack, pack_folder
from models import MODELS
from safetensors.torch import save_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".bench" / "corpus-envs"
MADE = ROOT / ".bench" / "corpus"

# PEFT, and what else was current on the day of its release.
RELEASES = {
    # accelerate imports pkg_resources, which setuptools dropped
    "0.2.0": ["transformers==4.28.1", "accelerate==0.20.3", "setuptools==80.9.0"],
    "0.3.0": ["transformers==4.29.2", "accelerate==0.20.3", "setuptools==80.9.0"],
    "0.5.0": ["transformers==4.32.1", "accelerate==0.22.0"],
    "0.7.1": ["transformers==4.36.2", "accelerate==0.25.0"],
    "0.10.0": ["transformers==4.39.3", "accelerate==0.29.3"],
    "0.13.2": ["transformers==4.45.2", "accelerate==1.0.1"],
    "0.17.1": ["transformers==4.56.2", "accelerate==1.10.1"],
    "0.18.1": ["transformers==4.57.6", "accelerate==1.12.0"],
    "0.19.1": ["transformers==5.5.4", "accelerate==1.13.0"],
    "0.21.2": ["transformers==5.23.0", "accelerate==1.15.0"],
}
VARIABLES = {
    "PYTHONHASHSEED": "0",  # old releases write sets as lists, in the order of their hashes
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


def torch_pin() -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def pip(python: Path, *packages: str) -> None:
    """Install with this environment's pip; torch stays what it is."""
    constraint = ENVIRONMENTS / "torch.txt"
    constraint.write_text(torch_pin() + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, "-c", str(constraint), *packages], check=True)


def environment(name: str, packages: list[str], *, torch_from: Path | None = None) -> Path:
    """A virtual environment's folder; made once for each list of packages."""
    folder = ENVIRONMENTS / name
    done, wanted = folder / "packages.json", json.dumps([torch_pin(), *packages])
    if done.exists() and done.read_text() == wanted:
        return folder
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    if torch_from:
        (site(folder) / "torch.pth").write_text(f"{site(torch_from)}\n")
    pip(folder / "bin" / "python", *packages)
    done.write_text(wanted)
    return folder


def site(folder: Path) -> Path:
    return next(folder.glob("lib/python*/site-packages"))


def make_bases() -> None:
    """The same bytes on every run."""
    for name, model in MODELS.items():
        folder = MADE / "bases" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
        torch.manual_seed(0)
        save_file(_values(name), folder / "model.safetensors", {"format": "pt"})


def _values(name: str) -> dict[str, torch.Tensor]:
    model = MODELS[name]
    if model.build:
        model_made = model.build()
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model_made = LlamaForCausalLM(LlamaConfig(**model.config))
    values = model_made.state_dict()
    if model.config.get("tie_word_embeddings"):
        del values["lm_head.weight"]
    for key, value in values.items():
        norm = value.dim() == 1 and key.endswith("weight")
        values[key] = 0.3 * torch.randn(value.shape) + (1 if norm else 0)
    return values


def write(release: str) -> None:
    common = environment("torch", [torch_pin(), "numpy", "safetensors", "scipy", "scikit-learn"])
    wanted = [f"peft=={release}", "safetensors", *RELEASES[release]]
    folder = environment(release, wanted, torch_from=common)
    shutil.rmtree(MADE / release, ignore_errors=True)
    command = [folder / "bin" / "python", HERE / "write.py", release]
    subprocess.run(command, cwd=MADE, env={**os.environ, **VARIABLES}, check=True)
    index = json.loads((MADE / release / "index.json").read_text())
    print(f"PEFT {release}: {len(index['kinds'])} kinds, and {len(index['absent'])} that fail")


def made(release: str) -> bool:
    return (MADE / release / "index.json").exists()


if __name__ == "__main__":
    make_bases()
    asked = sys.argv[1:] or list(RELEASES)
    for release in RELEASES:
        if release in asked or not made(release):
            write(release)
    pack_folder(MADE / "bases", HERE / "bases.tar.xz")
    pack([MADE / release for release in RELEASES], HERE)
