"""What MergeKit makes of `parity_recipes`, as fingerprints: the truth of `test_parity.py`.

    MERGEKIT_PYTHON tests/recipes/make_parity_goldens.py [NAME …]

in an environment with mergekit 0.1.5 (see CONTRIBUTING.md). Writes parity_goldens.json beside it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from parity_models import fingerprint, write_all
from parity_recipes import OTHERS, RECIPES
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).absolute().parent


# MergeKit fuses the experts of a layer before it merges; of one tensor for each expert, as they lie
# on the disk, its other tool tells the outcome.
TENSOR_BY_TENSOR = ("mixtral ties", "mixtral slerp", "mixtral nuslerp", "mixtral ramplus_tl")
# Whose config.json says what becomes of a tensor.
CONFIGS = ("tied base",)


def whole(folder: Path) -> None:
    """Put all shards in one file beside the folder."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors, folder.with_suffix(".safetensors"))


def rounded(golden: dict[str, list[float]]) -> dict[str, list[float]]:
    """In ten digits: more than are compared."""
    return {name: [float(f"{number:.10g}") for number in each] for name, each in golden.items()}


def main() -> None:
    recipes = RECIPES | OTHERS
    names = sys.argv[1:] or list(recipes)
    kit = str(Path(sys.executable).with_name("mergekit-yaml"))
    path = HERE / "parity_goldens.json"
    known = json.loads(path.read_text()) if sys.argv[1:] else {}
    goldens, configs = known.get("recipes", {}), known.get("configs", {})
    options = ["--no-write-model-card", "--no-copy-tokenizer"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_all(root)
        for name in names:
            text = recipes[name]
            tool = [kit, "recipe.yml", "out", *options, "--lora-merge-cache", "merged"]
            if name in TENSOR_BY_TENSOR:
                text = re.sub(r"(model: )(mixtral-\w+)", rf"\1{root}/\2.safetensors", text)
                tool = [str(Path(kit).with_name("mergekit-pytorch")), "recipe.yml", "out"]
                for letter in ("base", "a", "b"):
                    whole(root / f"mixtral-{letter}")
            if name == "several":
                tool = [str(Path(kit).with_name("mergekit-multi")), "recipe.yml", *options]
                tool += ["--out-path", "out", "--intermediate-dir", "between"]
            (root / "recipe.yml").write_text(text)
            run = subprocess.run(
                tool,
                cwd=root,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if run.returncode:
                sys.exit(f"{name}: {run.stderr.strip().splitlines()[-1]}")
            found = {}
            for file in sorted((root / "out").glob("*.safetensors")):
                found |= {key: fingerprint(value) for key, value in load_file(file).items()}
            goldens[name] = found
            if name in CONFIGS:
                told = json.loads((root / "out/config.json").read_text())
                configs[name] = {"tie_word_embeddings": told["tie_word_embeddings"]}
            subprocess.run(["rm", "-r", str(root / "out")], check=True)
    lines = [f"{json.dumps(k)}: {json.dumps(rounded(v))}" for k, v in goldens.items()]
    head = {"mergekit": version("mergekit"), "configs": configs}
    text = json.dumps(head)[:-1] + ',\n"recipes": {\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text)


if __name__ == "__main__":
    main()
