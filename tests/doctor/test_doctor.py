"""What `weft doctor` says of adapters, and that what it fixes is sound for PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from tests.plan.test_repairs import DISTURBANCES, MODULES, rename

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Folders

P = "base_model.model."


def edit(adapter: Path, **config: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def levels(found: weft.Diagnosis) -> list[str]:
    return [finding.level for finding in found.findings]


def test_sound(folders: Folders) -> None:
    base, adapter = folders.base(MODULES), folders.adapter(MODULES)
    for found in (weft.doctor(adapter), weft.doctor(adapter, base)):
        assert found.verdict == "sound"
        assert found.adapter is not None
        assert len(found.adapter.entries) == 4
    assert found.plan is not None


@pytest.mark.parametrize("name", DISTURBANCES)
def test_disturbed_keys(name: str, folders: Folders) -> None:
    """Told, and written so that they are sound: with the base, which decides some."""
    base, adapter = folders.base(MODULES), folders.adapter(MODULES)
    keys = load_file(adapter / "adapter_model.safetensors").keys()
    rename(adapter, DISTURBANCES[name])
    found = weft.doctor(adapter, base, fix=folders.root / "fixed")
    assert found.plan is not None
    if name not in ("model-missing", "model-doubled"):
        assert found.verdict == "problems"
        assert "repaired" in levels(found)
        assert load_file(folders.root / "fixed" / "adapter_model.safetensors").keys() == keys
    assert weft.doctor(folders.root / "fixed", base).verdict == "sound"
    for out, source in (("one", adapter), ("two", folders.root / "fixed")):
        weft.merge(base, source, output=folders.root / out)
    one, two = (folders.root / out / "model.safetensors" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
    "rank": ({"r": 3}, "says r = 3"),
    "two alphas": ({"alpha_pattern": {"q_proj": 1, "self_attn.q_proj": 2}}, "alpha_pattern"),
    "lost head": ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head'"),
    "lost tokens": ({"trainable_token_indices": [1]}, "no trained rows"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable(name: str, folders: Folders) -> None:
    config, says = UNUSABLE[name]
    adapter = folders.adapter(MODULES)
    edit(adapter, **config)
    found = weft.doctor(adapter)
    assert found.verdict == "unusable"
    assert any(says in finding.what for finding in found.findings if finding.level == "problem")
    with pytest.raises(weft.WeftError, match="cannot be fixed"):
        weft.doctor(adapter, fix=folders.root / "fixed")
    assert not (folders.root / "fixed").exists()


def test_values(folders: Folders) -> None:
    adapter = folders.adapter(MODULES)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file(tensors | {first: torch.full_like(tensors[first], torch.nan)}, file)
    found = weft.doctor(adapter)
    assert found.verdict == "unusable"
    assert first in found.findings[0].what
    assert found.adapter is not None, "what it is can be said all the same"
    save_file({k: v * (".lora_A." in k) for k, v in tensors.items()}, file)
    found = weft.doctor(adapter)
    assert found.verdict == "problems"
    assert "changes nothing" in found.findings[0].what


@pytest.mark.parametrize("change", ["hidden size", "layers"])
def test_another_base(change: str, folders: Folders) -> None:
    base = folders.base(MODULES if change == "hidden size" else MODULES[:2])
    adapter = folders.adapter(MODULES)
    if change == "hidden size":
        file = base / "model.safetensors"
        save_file({k: torch.randn(16, 16) for k in load_file(file)}, file)
    found = weft.doctor(adapter, base)
    assert found.verdict == "unusable"
    assert found.plan is None
    assert found.adapter is not None
    assert weft.doctor(adapter).verdict == "sound"


def test_modules_to_save_that_caught_more(folders: Folders) -> None:
    norms = {f"model.layers.0.{name}.weight": torch.ones(8) for name in ("norm", "input_layernorm")}
    adapter = folders.adapter(MODULES, norms, modules_to_save=["norm"])
    (finding,) = weft.doctor(adapter).findings
    assert finding.level == "warning"
    assert "model.layers.0.input_layernorm" in finding.what
    assert "model.layers.0.norm" not in finding.what


def test_biases_that_were_never_saved(folders: Folders) -> None:
    adapter = folders.adapter(MODULES, bias="lora_only")
    assert weft.doctor(adapter, folders.base(MODULES)).verdict == "sound", "there are none"
    biases = {f"{module}.bias": torch.ones(8) for module in MODULES}
    (finding,) = weft.doctor(adapter, folders.base(MODULES, biases, name="biased")).findings
    assert finding.level == "warning"
    assert "did not save them" in finding.what


def test_without_a_base(folders: Folders) -> None:
    """What the config alone says against the file."""
    adapter = folders.adapter(MODULES, target_modules=["q_proj"])
    (finding,) = weft.doctor(adapter).findings
    assert finding.level == "warning"
    assert "2 modules (model.layers.0.self_attn.v_proj" in finding.what
    edit(adapter, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    (finding,) = weft.doctor(adapter).findings
    assert finding.level == "warning"
    assert "PiSSA" in finding.what


# ------------------------------------------------------------------------------------ command line


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weft", "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_exit_codes(folders: Folders) -> None:
    base, adapter = folders.base(MODULES), folders.adapter(MODULES)
    sound = run(adapter, "--base", base)
    assert (sound.returncode, sound.stderr) == (0, "")
    assert f"is sound, and fits {base}" in sound.stdout
    assert "is sound in itself; --base BASE says" in run(adapter).stdout
    wide = folders.base(MODULES, name="wide")
    file = wide / "model.safetensors"
    save_file({k: torch.randn(16, 16) for k in load_file(file)}, file)
    misfit = run(adapter, "--base", wide)
    assert misfit.returncode == 2
    assert misfit.stdout.count("problem ") == 2, "one line for each kind of module"
    assert "(and 1 more like it)" in misfit.stdout
    rename(adapter, DISTURBANCES["no-prefix"])
    doubtful = run(adapter, "--fix", "-o", folders.root / "fixed")
    assert doubtful.returncode == 1
    assert "repaired" in doubtful.stdout
    assert run(folders.root / "fixed").returncode == 0
    edit(adapter, r=5)
    unusable = run(adapter, "--json")
    assert unusable.returncode == 2
    content = json.loads(unusable.stdout)
    assert content["verdict"] == "unusable"
    assert content["findings"][0]["cure"]
    for arguments in ((folders.root / "nothing",), (adapter, "--fix"), (adapter, "-o", "x")):
        wrong = run(*arguments)
        assert wrong.returncode == 2
        assert wrong.stderr.startswith("error: ")
        assert "Traceback" not in wrong.stderr


def test_fix_replaces_only_adapters(folders: Folders) -> None:
    adapter = folders.adapter(MODULES)
    fixed = folders.root / "fixed"
    fixed.mkdir()
    (fixed / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(weft.WeftError, match="exists"):
            weft.doctor(adapter, fix=fixed, force=force)
    assert (fixed / "thesis.txt").exists()
    weft.doctor(adapter, fix=folders.root / "other")
    with pytest.raises(weft.WeftError, match="exists"):
        weft.doctor(adapter, fix=folders.root / "other")
    weft.doctor(adapter, fix=folders.root / "other", force=True)
    with pytest.raises(weft.WeftError, match="holds the adapter"):
        weft.doctor(adapter, fix=adapter, force=True)


def test_fix_never_takes_other_files_along(folders: Folders) -> None:
    """A trainer's folder has checkpoints beside the adapter; a link may lead to what is read."""
    adapter = folders.adapter(MODULES)
    (folders.root / "link").symlink_to(adapter)
    with pytest.raises(weft.WeftError, match="holds the adapter"):
        weft.doctor(folders.root / "link", fix=adapter, force=True)
    run_folder = folders.adapter(MODULES, name="run", files={"checkpoint-100/optimizer.pt": "x"})
    with pytest.raises(weft.WeftError, match="exists"):
        weft.doctor(adapter, fix=run_folder, force=True)
    assert (run_folder / "checkpoint-100" / "optimizer.pt").exists()


def test_fix_keeps_the_scaling(folders: Folders) -> None:
    """Of modules that the base calls otherwise; a pattern that cannot follow stops it."""
    base = folders.base([m.replace("model.", "model.language_model.") for m in MODULES])
    for name, pattern in (("last", "q_proj"), ("path", "^" + MODULES[0])):
        adapter = folders.adapter(MODULES, name=name, alpha_pattern={pattern: 64})
        edit(adapter, target_modules=MODULES)
        if name == "path":
            with pytest.raises(weft.WeftError, match="cannot be fixed: alpha_pattern names"):
                weft.doctor(adapter, base, fix=folders.root / "fixed-path")
            continue
        weft.doctor(adapter, base, fix=folders.root / "fixed")
        assert weft.doctor(folders.root / "fixed", base).verdict == "sound"
        for out, source in (("one", adapter), ("two", folders.root / "fixed")):
            weft.merge(base, source, output=folders.root / out)
        one, two = (folders.root / out / "model.safetensors" for out in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_fix_drops_patterns_that_match_nothing(folders: Folders) -> None:
    """PEFT warns of them; those that match stay."""
    adapter = folders.adapter(MODULES, alpha_pattern={"nothing": 64, "q_proj": 32})
    found = weft.doctor(adapter, fix=folders.root / "fixed")
    assert found.rewritten == ("alpha_pattern without nothing: no module is called so",)
    config = json.loads((folders.root / "fixed" / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == {"q_proj": 32}


# -------------------------------------------------------------------------------------------- PEFT


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["another-name", "doubled-prefix", "torch-compile", "base-layer"])
def test_peft_loads_what_was_fixed(name: str, tmp_path: Path) -> None:
    """Without a warning, and to the same model; the disturbed one it takes for nothing."""
    from peft import PeftModel

    from tests import helpers

    base = helpers.save_base("llama", "float32", tmp_path / "base")
    config = {"target_modules": ["q_proj", "down_proj"]}
    adapter = helpers.make_adapter(
        base, "AutoModelForCausalLM", tmp_path / "adapter", config=config
    )
    truth = helpers.logits(helpers.open_peft(base, "AutoModelForCausalLM", adapter))
    rename(adapter, DISTURBANCES[name])
    weft.doctor(adapter, base, fix=tmp_path / "fixed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = helpers.open_model(base, "AutoModelForCausalLM")
        fixed = PeftModel.from_pretrained(model, tmp_path / "fixed").eval()
    assert torch.equal(helpers.logits(fixed), truth)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        lost = helpers.open_peft(base, "AutoModelForCausalLM", adapter)
    assert not torch.equal(helpers.logits(lost), truth)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_pattern_that_is_no_regular_expression(field: str, folders: Folders) -> None:
    """PEFT stops at it, so that neither the adapter nor a copy of it is sound."""
    base, adapter = folders.base(MODULES), folders.adapter(MODULES)
    edit(adapter, **{field: "(q_proj"})
    for found in (weft.doctor(adapter), weft.doctor(adapter, base)):
        assert found.verdict == "problems"
        (finding,) = (f for f in found.findings if f.level == "warning")
        assert f"{field} = '(q_proj'" in finding.what
        assert "PEFT cannot load" in finding.what
