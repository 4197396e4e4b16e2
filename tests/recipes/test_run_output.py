"""What `weft run` writes beside the weights, what it refuses, and what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from running import HIDDEN, MATRIX, VOCABULARY, checkpoint, llama, load, lora, random, run
from safetensors.torch import load_file

import weft
from weft.cli.app import main
from weft.core.errors import WeftError

if TYPE_CHECKING:
    from pathlib import Path

SIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, `a` and `b` in bfloat16, `adapter` for them; the working folder."""
    for number, name in enumerate(("base", "a", "b")):
        checkpoint(tmp_path / name, llama(number or None), {"who": name})
        for file in SIDE:
            (tmp_path / name / file).write_text(json.dumps({"who": name}))
    lora(tmp_path / "adapter", 1, rms=1e-3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 1}\n"
TIES = """\
merge_method: ties # of two
base_model: base
models:
  - model: a
    parameters:
      density: [0.2, 0.8]
      weight:
        - filter: self_attn
          value: 0.9
        - value: 0.3
  - {model: b+adapter, parameters: {weight: 0.5, density: 0.6}}
out_dtype: float16
"""


def manifest(root: Path, out: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / out / "weft.json").read_text())
    return found


# ------------------------------------------------------------------------- beside the weights


@pytest.mark.parametrize("seed", ["0", "1"])
@pytest.mark.parametrize(("text", "donor"), [(LINEAR, "a"), (TIES, "base")], ids=["first", "base"])
def test_donor_of_the_files(text: str, donor: str, seed: str, root: Path) -> None:
    """The base, or else the first model, whatever the order of a set may be."""
    (root / "recipe.yml").write_text(text)
    command = [sys.executable, "-m", "weft", "run", "recipe.yml", "-o", "out", "-q"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    for file in SIDE:
        assert json.loads((root / "out" / file).read_text()) == {"who": donor}
    assert json.loads((root / "out/config.json").read_text())["who"] == donor


def test_recipe_card_and_manifest(root: Path) -> None:
    found = run(root, TIES, seed=3)
    assert (root / "out/mergekit_config.yml").read_text() == TIES
    card = (root / "out/README.md").read_text()
    assert f"```yaml\n{TIES}```" in card
    for name in ("base", "a", "b", "adapter"):
        assert f"\n- {name}\n" in card
    assert "- ties\n" in card.split("---")[1]
    told = manifest(root)
    assert told["operation"] == "run"
    inputs = {entry["file"]: entry["role"] for entry in told["inputs"]}
    for name, role in (("base", "base"), ("a", "model 1"), ("b", "model 2")):
        assert inputs[str(root / name / "model.safetensors")] == role
    assert inputs[str(root / "adapter/adapter_model.safetensors")] == "model 2 adapter 1"
    assert told["tensors"].keys() == found.keys()
    config = json.loads((root / "out/config.json").read_text())
    assert (config.get("torch_dtype") or config.get("dtype")) == "float16"
    assert {value.dtype for value in found.values()} == {torch.float16}


def test_manifest_says_the_parameters_of_every_tensor(root: Path) -> None:
    """After filters and gradients: density 0.2 in the first layer, 0.8 in the last."""
    run(root, TIES)
    tensors = manifest(root)["tensors"]
    for layer, density in ((0, 0.2), (1, 0.8)):
        entry = tensors[f"{MATRIX.format(layer)}.weight"]
        assert entry["operation"] == "ties"
        assert entry["parameters"]["normalize"] is True
        assert entry["parameters"]["lambda"] == 1
        assert entry["inputs"] == [
            {"weight": 0.9, "density": pytest.approx(density)},
            {"weight": 0.5, "density": 0.6},
        ]
        norm = tensors[f"model.layers.{layer}.input_layernorm.weight"]
        assert norm["inputs"][0] == {"weight": 0.3, "density": pytest.approx(density)}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert tensors[name]["inputs"][0] == {"weight": 0.3, "density": 0.2}


def test_a_run_can_be_run_again_from_its_output(root: Path) -> None:
    one = run(root, TIES)
    (root / "again.yml").write_bytes((root / "out/mergekit_config.yml").read_bytes())
    weft.run("again.yml", output="again")
    assert manifest(root)["plan"] == manifest(root, "again")["plan"]
    assert all(torch.equal(value, load(root / "again")[name]) for name, value in one.items())


def test_shards_and_index(root: Path) -> None:
    """Those of the base where the output has its tensors; else of the size that is asked for."""
    from safetensors.torch import save_file

    tensors = llama()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, root / "base" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (root / "base/model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (root / "base/model.safetensors.index.json").write_text(json.dumps(index))
    kept, sized = run(root, TIES, "kept"), run(root, TIES, "sized", max_shard_size="8KB")
    for folder, found in (("kept", kept), ("sized", sized)):
        told = json.loads((root / folder / "model.safetensors.index.json").read_text())
        assert told["metadata"]["total_size"] == sum(2 * v.numel() for v in found.values())
        assert told["weight_map"].keys() == tensors.keys() == found.keys()
        for name, file in told["weight_map"].items():
            assert torch.equal(load_file(root / folder / file)[name], found[name])
            assert torch.equal(found[name], kept[name])
        if folder == "kept":
            assert told["weight_map"] == weight_map
            continue
        files = [load_file(path) for path in (root / folder).glob("*.safetensors")]
        sizes = [sum(2 * v.numel() for v in each.values()) for each in files]
        assert len(sizes) > 2
        assert max(sizes) <= 8_000


# ------------------------------------------------------------------------------- one rounding


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_rounded_once(method: str, tmp_path: Path) -> None:
    """`dtype` says what is written, and never what is computed in."""
    shared = random(300, 300, seed=0, size=0.02)
    tensors = {"base": {"w.weight": shared.bfloat16()}}
    for seed, (name, dtype) in enumerate([("a", torch.bfloat16), ("b", torch.float32)], 1):
        tensors[name] = {"w.weight": (shared + random(300, 300, seed=seed, size=2e-3)).to(dtype)}
    for name, each in tensors.items():
        checkpoint(tmp_path / name, each)
    text = f"""
        merge_method: {method}
        models:
          - {{model: {tmp_path}/a, parameters: {{weight: 0.3}}}}
          - {{model: {tmp_path}/b, parameters: {{weight: 0.9}}}}
        """
    text += "" if method == "linear" else f"base_model: {tmp_path}/base\n"
    exact = _exact(method, *(each["w.weight"].double() for each in tensors.values()))
    for number, (dtypes, written) in enumerate(
        [
            ("", torch.float32),
            ("dtype: bfloat16", torch.bfloat16),
            ("dtype: float16\n        out_dtype: bfloat16", torch.bfloat16),
            ("dtype: bfloat16\n        out_dtype: float32", torch.float32),
            ("out_dtype: float16", torch.float16),
        ]
    ):
        found = run(tmp_path, f"{text.rstrip()}\n        {dtypes}\n", f"out{number}")["w.weight"]
        assert found.dtype == written
        if written == torch.float32:
            assert float((found.double() - exact).abs().max()) < 3e-8
        else:
            right = found == exact.float().to(written)
            # Of eleven bits more fall on the other side of a half than of eight.
            least = 0.9999 if written == torch.bfloat16 else 0.999
            assert float(right.double().mean()) >= least


def _exact(method: str, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if method == "linear":
        return (0.3 * a + 0.9 * b) / 1.2
    d = torch.stack([a - base, b - base])
    w = torch.tensor([0.3, 0.9], dtype=torch.float64).view(2, 1, 1)
    sign = torch.where((w * d).sum(0) >= 0, 1.0, -1.0)
    agrees = d.sign() == sign
    share = (w * agrees).sum(0)
    return base + (w * d * agrees).sum(0) / torch.where(share == 0, 1.0, share)


# -------------------------------------------------------------------------------- wrong models


def _config(root: Path, name: str, **changes: Any) -> None:
    path = root / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _wider(root: Path) -> None:
    tensors = {n: torch.zeros([2 * s for s in v.shape]) for n, v in llama().items()}
    checkpoint(root / "wide", tensors, {"hidden_size": 2 * HIDDEN, "vocab_size": 2 * VOCABULARY})


def _deeper(root: Path) -> None:
    checkpoint(root / "deep", llama(layers=3))


def _other(root: Path) -> None:
    tensors = {f"transformer.h.{n}.attn.weight": torch.zeros(4, 4) for n in range(2)}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    checkpoint(root / "other", tensors, config)


def _narrow_adapter(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    lora(root / "narrow", 1, rms=1e-3)
    path = root / "narrow/adapter_model.safetensors"
    cut = {n: v[:, :32] if "lora_A" in n else v[:32] for n, v in load_file(path).items()}
    save_file({n: v.contiguous() for n, v in cut.items()}, path)


def _nothing(root: Path) -> None:
    return


MODELS = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n  - model: a\n"
AT = "@ models[1], line 5, column 5"
WRONG = {
    "missing": ("  - model: ./nowhere\n", _nothing, ["./nowhere", AT]),
    "missing adapter": ("  - model: b+./nowhere\n", _nothing, ["./nowhere", AT]),
    "wide": (
        "  - model: wide\n",
        _wider,
        ["a and wide do not fit each other", "hidden_size 48 and 96", AT],
    ),
    "deep": (
        "  - model: deep\n",
        _deeper,
        ["a and deep do not fit each other: 2 and 3 layers", AT],
    ),
    "architecture": ("  - model: other\n", _other, ["LlamaForCausalLM", "GPT2LMHeadModel", AT]),
    "adapter": ("  - model: b+narrow\n", _narrow_adapter, ["narrow", "32", AT]),
    "base": ("  - model: b\nbase_model: ./none\n", _nothing, ["./none", "@ base_model, line 6"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_models_that_do_not_fit(case: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any weight is read, with the place in the YAML; nothing is written."""
    more, make, says = WRONG[case]
    make(root)
    monkeypatch.setattr("weft.execute._files.Files.read", _never)
    monkeypatch.setattr("weft.execute.copies.Copies.__init__", _never)
    text = MODELS + more
    for verb in (weft.run, weft.plan_run):
        (root / "recipe.yml").write_text(text)
        with pytest.raises(WeftError) as error:
            verb("recipe.yml", output="out")
        assert str(error.value).split("\n")[0].endswith(" in recipe.yml")
        for each in says:
            assert each in str(error.value), str(error.value)
        assert len(str(error.value)) < 1500
    assert not list(root.glob("out*"))


def _never(*_arguments: Any, **_options: Any) -> None:
    raise AssertionError("a weight was read")


def test_all_models_that_do_not_fit_are_said_at_once(root: Path) -> None:
    (root / "recipe.yml").write_text(f"{MODELS}  - model: ./x\n  - model: ./y\n")
    with pytest.raises(WeftError) as error:
        weft.run("recipe.yml", output="out")
    assert "models[1], line 5" in str(error.value)
    assert "models[2], line 6" in str(error.value)


@pytest.mark.parametrize("lora", ["", "lora: {path: adapter}, "], ids=["plain", "adapter"])
def test_architecture_may_be_overridden(lora: str, root: Path) -> None:
    """What a config calls itself is what the user says; in the donor's it is written, too.

    MergeKit forgets it where there is an adapter.
    """
    text = LINEAR.replace("model: a", "model: a+adapter") if lora else LINEAR
    plain = run(root, text, "plain")
    _config(root, "a", architectures=["MyLlamaForCausalLM"])
    with pytest.raises(WeftError, match="MyLlamaForCausalLM"):
        weft.run("recipe.yml", output="out")
    named = f"{{model: {{path: a}}, {lora}override_architecture: LlamaForCausalLM}}"
    found = run(root, LINEAR.replace("model: a", f"model: {named}"))
    config = json.loads((root / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["who"] == "a"
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


# --------------------------------------------------------------------------------- command line


def weft_main(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def test_lora_merge_options_are_ignored(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "recipe.yml").write_text(TIES)
    options = ["--lora-merge-cache", "cache", "--lora-merge-dtype", "bfloat16"]
    weft_main(["run", "recipe.yml", "-o", "out", *options])
    said = capsys.readouterr().err.splitlines()
    for option, why in (("cache", "adapters are merged as they stream"), ("dtype", "rounded once")):
        (line,) = (line for line in said if f"--lora-merge-{option}" in line)
        assert line.startswith("note: ")
        assert "not needed: " in line
        assert why in line
    assert not (root / "cache").exists()
    assert (root / "out/model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--cuda"], "--device cuda"),
        (["--random-seed", "3"], "--seed"),
        (["--out-shard-size", "5B"], "--max-shard-size"),
        (["--lazy-unpickle"], "leave it out"),
        (["--low-cpu-memory"], "leave it out"),
        (["--copy-tokenizer"], "leave it out"),
        (["--allow-crimes"], "architecture"),
        (["--multi-gpu"], "--device"),
        (["--num-threads", "4"], "--threads"),
        (["-j", "4"], "--threads"),
        (["--unsafe-truncate-embeddings"], "tokenizer"),
        (["--trust-remote-code"], "leave it out"),
        (["--intermediate-dir", "x"], "streamed"),
        (["--out-path", "x"], "-o"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_of_mergekit(
    options: list[str], hint: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "recipe.yml").write_text(LINEAR)
    assert weft_main(["run", "recipe.yml", "-o", "out", *options]) == 2
    said = capsys.readouterr().err
    assert options[0] in said
    assert f"hint: {hint}" in said or hint in said.split("hint:")[-1]


def test_check_reads_no_weight(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.execute._files.Files.read", _never)
    for name in ("base", "a", "b"):  # the header alone is left
        path = root / name / "model.safetensors"
        size = path.stat().st_size
        head = path.read_bytes()[: 8 + int.from_bytes(path.read_bytes()[:8], "little")]
        path.write_bytes(head)
        os.truncate(path, size)
    (root / "recipe.yml").write_text(LINEAR)
    weft_main(["run", "recipe.yml", "--check"])
    assert capsys.readouterr().out.startswith("recipe.yml: sound; linear of a, b: ")
    assert not (root / "out").exists()


def test_dry_run_and_run_are_of_one_plan(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "recipe.yml").write_text(TIES)
    weft_main(["run", "recipe.yml", "-o", "out", "--dry-run", "--json"])
    planned = json.loads(capsys.readouterr().out)
    assert not (root / "out").exists()
    weft_main(["run", "recipe.yml", "-o", "out", "--json"])
    done = json.loads(capsys.readouterr().out)
    assert planned["plan"] == done["manifest"]["plan"]
    assert planned["tensors"].keys() == done["manifest"]["tensors"].keys()
    assert planned["schema"] == done["schema"] == 1


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    from weft import methods

    weft_main(["methods"])
    listed = capsys.readouterr().out
    parts = re.split(r"^(?=\w)", listed, flags=re.MULTILINE)[1:]
    sections = {part.split()[0]: " ".join(part.split()) for part in parts}
    assert list(sections) == methods.names()
    for name, section in sections.items():
        assert section.startswith(f"{name} {methods.method(name).USE_WHEN}")
        parameters = methods.method(name).PARAMETERS
        assert re.findall(r"(\w+) \((?:float|int|bool), ", section) == list(parameters)
        for key, own in parameters.items():
            told = section.split(f" {key} (")[1].split(")")[0]
            assert ("per model" if own.each else "one for all") in told
            assert ("must be given" if own.required else "default ") in told
            assert f"{told}): {own.what}" in section
        weft_main(["methods", name])
        shown = capsys.readouterr().out
        assert all(each in shown for each in methods.method(name).PARAMETERS)
    weft_main(["methods", "--json"])
    assert json.loads(capsys.readouterr().out)["methods"].keys() == set(methods.names())
    assert weft_main(["methods", "tise"]) == 2
    assert "did you mean ties?" in capsys.readouterr().err


def test_schema_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """What it accepts and refuses is tested beside the corpus of recipes."""
    weft_main(["schema"])
    found = json.loads(capsys.readouterr().out)
    assert found["$schema"].startswith("https://json-schema.org/")
    assert {"merge_method", "models", "slices", "tokenizer"} <= set(json.dumps(found).split('"'))
