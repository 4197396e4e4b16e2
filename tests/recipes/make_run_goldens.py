"""What MergeKit makes of `run_cases`, as fingerprints: the truth of `test_run_cases.py`.

    MERGEKIT_PYTHON tests/recipes/make_run_goldens.py

in an environment with mergekit 0.1.5 (see CONTRIBUTING.md). Writes run_goldens.json beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run_cases import (
    GOLDENS,
    PARTLY,
    STATE_DICTS,
    WITH_TOKENIZERS,
    told,
    write_models,
    write_partly,
    write_state_dicts,
)
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from collections.abc import Callable


def run(
    tool: str,
    cases: dict[str, str],
    write: Callable[[Path], None],
    options: dict[str, str] | None = None,
) -> dict[str, Any]:
    goldens = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root)
        for number, (name, text) in enumerate(cases.items()):
            (root / "recipe.yml").write_text(text)
            command = [str(Path(sys.executable).with_name(tool)), "recipe.yml", f"out{number}"]
            command += ["--no-write-model-card"] if tool == "mergekit-yaml" else []
            command += [options[name]] if options else []
            done = subprocess.run(
                command,
                cwd=root,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-3000:]}")
            out, tensors = root / f"out{number}", {}
            for file in sorted(out.glob("*.safetensors")):
                tensors |= load_file(file)
            goldens[name] = told(tensors, out)
    return goldens


def main() -> None:
    goldens = {
        "with tokenizers": run("mergekit-yaml", WITH_TOKENIZERS, write_models),
        "state dicts": run("mergekit-pytorch", STATE_DICTS, write_state_dicts),
        "partly": run(
            "mergekit-pytorch",
            {name: text for name, (_, text) in PARTLY.items()},
            write_partly,
            {name: option for name, (option, _) in PARTLY.items()},
        ),
    }
    parts = []
    for kind, cases in goldens.items():
        lines = [f"{json.dumps(name)}: {json.dumps(golden)}" for name, golden in cases.items()]
        parts.append(f"{json.dumps(kind)}: {{\n" + ",\n".join(lines) + "\n}")
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    Path(__file__).with_name(GOLDENS).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
