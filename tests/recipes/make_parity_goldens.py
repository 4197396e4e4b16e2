"""What MergeKit makes of `parity_recipes`, as fingerprints: the truth of `test_parity.py`.

    MERGEKIT_PYTHON tests/recipes/make_parity_goldens.py

in an environment with mergekit 0.1.5 (see CONTRIBUTING.md). Writes parity_goldens.json beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from parity_models import fingerprint, write_all
from parity_recipes import RECIPES
from safetensors.numpy import load_file

HERE = Path(__file__).absolute().parent


def main() -> None:
    kit = str(Path(sys.executable).with_name("mergekit-yaml"))
    goldens: dict[str, dict[str, list[float]]] = {}
    options = ["--no-write-model-card", "--no-copy-tokenizer"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_all(root)
        for name, text in RECIPES.items():
            (root / "recipe.yml").write_text(text)
            run = subprocess.run(
                [kit, "recipe.yml", "out", *options],
                cwd=root,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if run.returncode:
                print(f"{name}: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            found = {}
            for file in sorted((root / "out").glob("*.safetensors")):
                found |= {key: fingerprint(value) for key, value in load_file(file).items()}
            goldens[name] = found
            subprocess.run(["rm", "-r", str(root / "out")], check=True)
            print(f"{name}: {len(found)} tensors", file=sys.stderr)
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in goldens.items()]
    text = '{"mergekit": "%s",\n"recipes": {\n%s\n}}\n' % (version("mergekit"), ",\n".join(lines))
    (HERE / "parity_goldens.json").write_text(text)


if __name__ == "__main__":
    main()
