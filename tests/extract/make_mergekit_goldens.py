"""What MergeKit makes of `base+ADAPTER` of Weft's adapters: the truth of `test_mergekit_loads`.

    MERGEKIT_PYTHON tests/extract/make_mergekit_goldens.py WEFT

in an environment with mergekit 0.1.5; WEFT is the program that extracts. Writes
mergekit_goldens.json beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE.parent / "recipes"))

from mergekit_cases import CASES, form_of  # noqa: E402
from parity_models import fingerprint, write_all  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

RECIPE = """\
merge_method: linear
dtype: float32
models:
  - model: {base}+adapter
    parameters: {{weight: 1.0}}
"""


def main() -> None:
    weft = sys.argv[1]
    kit = str(Path(sys.executable).with_name("mergekit-yaml"))
    goldens, forms = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_all(root)
        for name, (base, tuned, options) in CASES.items():
            run([weft, "extract", tuned, "--base", base, "-o", "adapter", "-q", *options], root)
            (root / "recipe.yml").write_text(RECIPE.format(base=base))
            more = ["--lora-merge-cache", "cache", "--no-write-model-card", "--no-copy-tokenizer"]
            run([kit, "recipe.yml", "out", *more], root)
            found = {}
            for file in sorted((root / "out").glob("*.safetensors")):
                found |= {key: fingerprint(value) for key, value in load_file(file).items()}
            goldens[name], forms[name] = found, form_of(root / "adapter")
            run(["rm", "-r", "out", "adapter", "cache"], root)
    parts = [f'{{"mergekit": "{version("mergekit")}"']
    for kind, cases in (("cases", goldens), ("adapters", forms)):
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in cases.items()]
        parts.append(f'"{kind}": {{\n' + ",\n".join(lines) + "\n}")
    text = ",\n".join(parts) + "}\n"
    (HERE / "mergekit_goldens.json").write_text(text)


def run(command: list[str], folder: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
