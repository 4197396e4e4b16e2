"""Vision-language models: transformers 4.52 renamed their modules in memory, not in the files."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import helpers
import peft
import pytest
import torch

import weft
from oracle import other_scenes
from weft.plan._in_memory import _WITH_TOWERS, _WITH_VISUAL, in_memory

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.oracle, *map(pytest.mark.filterwarnings, helpers.WARNINGS)]


@pytest.mark.parametrize("when", ["before", "since"])
@pytest.mark.parametrize("model", other_scenes.BEFORE)
def test_both_names(tmp_path: Path, model: str, when: str) -> None:
    """The old ones are told and repaired, the new ones are sound; PEFT loads either copy."""
    old = other_scenes.BEFORE[model]
    rename = old if when == "before" else None
    scene = other_scenes.vision(tmp_path, model=model.lower(), rename=rename)
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    assert any(name.startswith(old[1]) for name in helpers.load(base))
    found = weft.doctor(adapter, base, fix=tmp_path / "fixed")
    assert found.verdict == ("problems" if when == "before" else "sound")
    said = [f.what for f in found.findings if "transformers before 4.52" in f.what]
    assert len(said) == (when == "before")
    weft.merge(base, adapter, output=tmp_path / "strict", strict=True)  # the files have the names
    assert weft.doctor(tmp_path / "fixed", base).verdict == "sound"
    keys = helpers.load(tmp_path / "fixed")
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(scene.open(base), tmp_path / "fixed").eval()
    assert torch.equal(scene.run(loaded), scene.want)
    assert scene.weft() == "merged"


NAMES = [
    *("language_model.model.layers.0.mlp.up_proj.weight", "language_model.lm_head.weight"),
    *("vision_tower.blocks.0.fc1.weight", "multi_modal_projector.linear_1.weight"),
    *("visual.blocks.0.attn.qkv.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"),
    *("model.language_model.layers.0.mlp.up_proj.weight", "model.visual.merger.weight"),
]


# Towers that these do not have.
NOT_OF = dict.fromkeys(
    ("fuyu", "mllama", "video_llava", "qwen2_audio", "voxtral"), ("vision_tower",)
) | {"fuyu": ("vision_tower", "multi_modal_projector")}


# `language_model.model` loses its `model` in a rule of the part by itself.
PART = ("language_model.model.", "language_model.")


@pytest.mark.parametrize("kind", sorted(_WITH_TOWERS | _WITH_VISUAL))
def test_as_transformers_has_it(kind: str) -> None:
    """The table is that of transformers, whose rules are tried on names of each form."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    config = AutoConfig.for_model(kind)
    mapping = AutoModelForImageTextToText._model_mapping
    name = mapping[type(config)].__name__ if type(config) in mapping else kind
    rules = get_checkpoint_conversion_mapping(kind) or get_checkpoint_conversion_mapping(name)
    assert rules
    for old in NAMES[4:] if kind in _WITH_VISUAL else NAMES[:4]:
        if old.partition(".")[0] in NOT_OF.get(kind, ()):
            continue
        new: Any = old
        for rule in rules:
            if type(rule) is WeightRenaming:
                new = rule.rename_source_key(new)[0]
        assert in_memory(old, {"model_type": kind}) == new.replace(*PART), old
