"""A disturbed adapter merges to the bytes of the sound one, says so, and is refused by `strict`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file

import weft
from weft.core.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Folders

P = "base_model.model."
MODULES = [f"model.layers.{n}.self_attn.{name}" for n in range(2) for name in ("q_proj", "v_proj")]

# What PEFT 0.21.2 loads as nothing, with a warning at most.
DISTURBANCES: dict[str, Callable[[str], str]] = {
    "adapter-name": lambda k: k.replace(".weight", ".default.weight"),
    "another-name": lambda k: k.replace(".weight", ".my_run.weight"),
    "twice-named": lambda k: k.replace(".weight", ".default.default.weight"),
    "no-prefix": lambda k: k.removeprefix(P),
    "doubled-prefix": lambda k: P + k,
    "model-missing": lambda k: k.replace(P + "model.", P),
    "model-doubled": lambda k: k.replace(P, P + "model."),
    "language-model": lambda k: k.replace(P + "model.", P + "model.language_model."),
    "old-vision-language": lambda k: k.replace(P, P + "language_model."),
    "torch-compile": lambda k: k.replace(P, P + "_orig_mod."),
    "torch-compile-in-front": lambda k: "_orig_mod." + k,
    "data-parallel": lambda k: "module." + k,
    "data-parallel-inside": lambda k: k.replace(P, P + "module."),
    "fsdp": lambda k: k.replace("layers.", "layers._fsdp_wrapped_module."),
    "checkpointing": lambda k: k.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "base-layer": lambda k: k.replace(".lora_", ".base_layer.lora_"),
    "no-weight": lambda k: k.removesuffix(".weight"),
    "lora-down-up": lambda k: k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
}


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({change(key): value for key, value in load_file(file).items()}, file)


def merged(base: Path, adapter: Path, out: Path) -> bytes:
    weft.merge(base, adapter, output=out)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", DISTURBANCES)
def test_same_bytes_as_the_sound_one(name: str, folders: Folders) -> None:
    base, adapter = folders.base(MODULES), folders.adapter(MODULES)
    sound = merged(base, adapter, folders.root / "sound")
    rename(adapter, DISTURBANCES[name])
    report = weft.merge(base, adapter, output=folders.root / "out")
    assert (folders.root / "out" / "model.safetensors").read_bytes() == sound
    said = [*report.manifest["repairs"], *report.manifest["notes"]]
    assert said, "a repair is told"
    if name in ("model-missing", "model-doubled"):
        return  # where the adapter's model had another prefix, nothing was broken
    assert report.manifest["repairs"]
    with pytest.raises(PlanError) as error:
        weft.merge(base, adapter, output=folders.root / "strict", strict=True)
    assert len(error.value.problems) == len(report.manifest["repairs"])
    assert not (folders.root / "strict").exists()


VISION = [
    *(f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(2)),
    *("model.visual.blocks.0.attn.qkv", "lm_head"),
]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.language_model.", "model."),  # Qwen2-VL before transformers 4.52
        ("model.language_model.", "language_model.model."),  # LLaVA, Gemma 3
        ("model.language_model.", "language_model."),
    ],
)
def test_vision_language_models(old: str, new: str, folders: Folders) -> None:
    """The text model moved, and what was beside it moved with it."""
    base, adapter = folders.base(VISION), folders.adapter(VISION)
    sound = merged(base, adapter, folders.root / "sound")
    rename(
        adapter,
        lambda key: (
            key.replace(old, new)
            .replace("model.visual.", "visual.")
            .replace(P + "lm_head", P + "language_model.lm_head")
        ),
    )
    report = weft.merge(base, adapter, output=folders.root / "out")
    assert (folders.root / "out" / "model.safetensors").read_bytes() == sound
    assert len(report.manifest["repairs"]) >= 2


def test_two_readings_are_shown_and_not_guessed(folders: Folders) -> None:
    base = folders.base(["model.language_model.layers.0.q_proj", "language_model.layers.0.q_proj"])
    adapter = folders.adapter(["model.model.layers.0.q_proj"])
    with pytest.raises(PlanError) as error:
        weft.merge(base, adapter, output=folders.root / "out")
    said = str(error.value)
    assert "model.language_model.layers.0.q_proj.weight" in said
    assert " or " in said


def test_a_sound_adapter_passes_strict(folders: Folders) -> None:
    base, adapter = folders.base(MODULES), folders.adapter(MODULES)
    report = weft.merge(base, adapter, output=folders.root / "out", strict=True)
    assert report.manifest["repairs"] == []


@pytest.mark.parametrize("name", ["torch-compile", "data-parallel-inside"])
def test_patterns_that_lose_their_module(name: str, folders: Folders) -> None:
    """They would leave the scaling of the others, and nobody would know."""
    change = DISTURBANCES[name]
    trained = change(P + MODULES[0]).removeprefix(P)
    adapter = folders.adapter(MODULES, alpha_pattern={f"^{trained}": 64})
    rename(adapter, change)
    with pytest.raises(PlanError, match="alpha_pattern speaks of"):
        weft.merge(folders.base(MODULES), adapter, output=folders.root / "out")


def test_patterns_that_match_nothing_are_told(folders: Folders) -> None:
    adapter = folders.adapter(MODULES, alpha_pattern={"nosuch": 64})
    report = weft.merge(folders.base(MODULES), adapter, output=folders.root / "out")
    assert any("alpha_pattern has 'nosuch'" in note for note in report.manifest["notes"])
