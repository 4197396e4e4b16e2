"""What people see, kept as text: a change of it shows in a diff, and nowhere else.

WEFT_UPDATE_SNAPSHOTS=1 writes the files again.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import struct
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from weft.cli.app import main
from weft.formats.safetensors import build_header

SNAPSHOTS = Path(__file__).parent / "snapshots"
UPDATE = os.environ.get("WEFT_UPDATE_SNAPSHOTS", "0") not in ("", "0")
MASKS = [
    (r"\d+(\.\d+)? s, \d+\.\d+ GB/s", "<time> s, <rate> GB/s"),
    (r"\d+ min \d+ s, \d+\.\d+ GB/s", "<time> s, <rate> GB/s"),
    (r"elements, \d+(\.\d+)? s", "elements, <time> s"),
    # Of torch itself, and another one for each release of it.
    (r"about [\d.]+ [kMG]B at most", "about <memory> at most"),
]


RECIPES = {
    "recipe.yml": """\
merge_method: ties
base_model: base
models:
  - model: base+adapter
    parameters: {weight: 1, density: [0.2, 0.8]}
  - model: base+adapter:0.5
    parameters: {weight: [{filter: q_proj, value: 0.7}, {value: 0}], density: 0.5}
""",
    "wrong.yml": """\
merge_method: linear
models:
  - model: base
    parameters: {wieght: 1}
  - model: base+adapter
dtpye: bfloat16
""",
    "unfit.yml": """\
merge_method: linear
models:
  - model: base
  - model: base+other
  - model: ./nowhere
parameters: {weight: 1}
""",
}


def write(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, scale: float) -> None:
    """A safetensors file of values that are the same everywhere."""
    head, _ = build_header([(n, dtype, shape) for n, shape in tensors.items()], {"format": "pt"})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        for name, shape in tensors.items():
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            values = [scale * ((7 * n + len(name)) % 13 - 6) for n in range(count)]
            raw = struct.pack(f"<{count}f", *values)
            if dtype == "bfloat16":
                raw = b"".join(raw[4 * n + 2 : 4 * n + 4] for n in range(count))
            file.write(raw)


def as_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base in two shards, an adapter for it, and one for another model; all in `tmp_path`."""
    layers = {}
    for n in range(2):
        layers[f"model.layers.{n}.self_attn.q_proj.weight"] = (64, 64)
        layers[f"model.layers.{n}.mlp.down_proj.weight"] = (64, 96)
        layers[f"model.layers.{n}.input_layernorm.weight"] = (64,)
    parts = [{"model.embed_tokens.weight": (112, 64)}, layers | {"lm_head.weight": (112, 64)}]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        write(tmp_path / "base" / file, part, "bfloat16", 0.125)
        weight_map |= dict.fromkeys(part, file)
    as_json(tmp_path / "base/model.safetensors.index.json", {"weight_map": weight_map})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 112}
    config |= {"hidden_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False}
    as_json(tmp_path / "base/config.json", config | {"torch_dtype": "bfloat16"})
    for name in ("tokenizer.json", "generation_config.json"):
        as_json(tmp_path / "base" / name, {})
    (tmp_path / "base/training_args.bin").write_bytes(b"")
    (tmp_path / "existing").mkdir()
    as_json(tmp_path / "existing/weft.json", {})
    for name, wide in (("adapter", 64), ("other", 72)):
        factors = {}
        for n in range(2):
            key = f"base_model.model.model.layers.{n}.self_attn.q_proj"
            factors |= {f"{key}.lora_A.weight": (8, wide), f"{key}.lora_B.weight": (wide, 8)}
        write(tmp_path / name / "adapter_model.safetensors", factors, "float32", 0.03125)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16}
        config |= {"base_model_name_or_path": "example/tiny", "peft_version": "0.18.0"}
        as_json(tmp_path / name / "adapter_config.json", config)
    for name, recipe in RECIPES.items():
        (tmp_path / name).write_text(recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def transcript(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The command, what it wrote to stdout and stderr, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    arguments = shlex.split(command)[1:]
    monkeypatch.setattr(sys, "argv", ["weft", *arguments])
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    text = f"$ {command}\n"
    for name, stream in (("stdout", out), ("stderr", err)):
        if stream.getvalue():
            text += f"--- {name}\n{stream.getvalue()}"
    text += f"--- exit {code}\n"
    # macOS has its temporary folders behind a link.
    for path in {str(Path.cwd()), os.path.realpath(Path.cwd())}:
        text = text.replace(path, "<folder>")
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


COMMANDS = {
    "help": "weft --help",
    "merge-help": "weft merge --help",
    "inspect-help": "weft inspect --help",
    "inspect-base": "weft inspect base",
    "inspect-adapter": "weft inspect adapter",
    "dry-run": "weft merge base adapter:0.5 -o out --threads 2 --dry-run",
    "merge": "weft merge base adapter -o out",
    "diff-help": "weft diff --help",
    "diff-equal": "weft diff base base",
    "extract-help": "weft extract --help",
    "error-diff-filter": "weft diff base base --filter /(/",
    "merge-quiet": "weft merge base adapter -o out -q",
    "run-help": "weft run --help",
    "run-check": "weft run recipe.yml --check",
    "run-dry-run": "weft run recipe.yml -o out --threads 2 --dry-run",
    "run": "weft run recipe.yml -o out",
    "methods-ties": "weft methods ties",
    "error-recipe": "weft run wrong.yml -o out",
    "error-recipe-models": "weft run unfit.yml -o out",
    "error-option-of-mergekit": "weft run recipe.yml -o out --cuda --random-seed 3",
    "error-no-such-path": "weft merge ./basse adapter -o out",
    "error-other-model": "weft merge base other -o out",
    "error-output-exists": "weft merge base adapter -o existing",
    "error-output-is-input": "weft merge base adapter -o base",
    "error-unknown-dtype": "weft merge base adapter -o out --dtype int4",
    "error-no-output": "weft merge base adapter",
    "error-unknown-option": "weft merge base adapter -o out --dtyp bf16",
    "error-unknown-command": "weft marge base adapter -o out",
    "error-not-an-adapter": "weft merge adapter base -o out",
    "error-no-device": "weft merge base adapter -o out --device tpu",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_snapshot(name: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = transcript(COMMANDS[name], monkeypatch)
    path = SNAPSHOTS / f"{name}.txt"
    if UPDATE:
        SNAPSHOTS.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_snapshot_has_its_command() -> None:
    assert {path.stem for path in SNAPSHOTS.iterdir()} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_snapshots_are_fit_to_print(name: str) -> None:
    """No wider than the terminal where Weft breaks the lines; no escapes; errors end in 2."""
    text = (SNAPSHOTS / f"{name}.txt").read_text(encoding="utf-8")
    if name.endswith("help"):
        assert max(map(len, text.splitlines())) <= 100
    assert all(char.isprintable() or char == "\n" for char in text)
    failed = name.startswith("error-")
    assert text.endswith(f"--- exit {2 if failed else 0}\n")
    assert ("--- stdout" in text) == (not failed and name != "merge-quiet")
    assert text.count("\nerror: ") == failed
    assert "Traceback" not in text
