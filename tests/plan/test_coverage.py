"""An adapter's modules against those that its config names: what is said, and what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import weft
from weft.core.selection import numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import Folders


def modules(
    layers: Sequence[int] = range(4), *leaves: str, stack: str = "model.layers"
) -> list[str]:
    return [f"{stack}.{n}.{leaf}" for n in layers for leaf in leaves or ("q_proj", "v_proj")]


def warnings(
    folders: Folders, base: list[str], adapter: list[str], weight: str = "", **config: Any
) -> list[str]:
    """What a plan warns of; `base_…` are fields of the base's config."""
    own = {k.removeprefix("base_"): v for k, v in config.items() if k.startswith("base_")}
    rest = {k: v for k, v in config.items() if not k.startswith("base_")}
    made = f"{folders.adapter(adapter, **rest)}{weight}"
    return list(weft.plan_merge(folders.base(base, **own), made).warnings)


BOTH = ["q_proj", "v_proj"]
SOME = [n for n in modules() if n != "model.layers.2.v_proj"]


# ----------------------------------------------------------------------------------- too many


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["q_proj", "proj", "_proj", "layers.1", "v_proj.x"],
        r".*\.q_proj",
        r"model\.layers\.\d+\.q_proj|v_proj",
    ],
)
def test_modules_that_the_config_does_not_name(targets: Any, folders: Folders) -> None:
    (said,) = warnings(folders, modules(), modules(), target_modules=targets)
    shown = ", ".join(f"model.layers.{n}.v_proj" for n in range(3))
    assert f"/adapter adapts 4 modules ({shown} …), which its config does not name" in said
    assert "PEFT would leave it out" in said


def test_a_module_that_the_config_does_not_name(folders: Folders) -> None:
    adapter = [*modules(), "lm_head"]
    (said,) = warnings(folders, adapter, adapter, target_modules=BOTH)
    assert "adapts module lm_head, which" in said


def test_they_are_merged_all_the_same(folders: Folders) -> None:
    base, adapter = folders.base(modules()), folders.adapter(modules(), target_modules=["q_proj"])
    report = weft.merge(base, adapter, output=folders.root / "out")
    assert report.totals.changed == 8
    assert report.manifest["warnings"] == list(report.warnings)
    assert len(report.warnings) == 1


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": "all-linear"},
        {"target_modules": "All-Linear"},
        {"target_modules": "*.q_proj"},  # no regular expression
        {"target_modules": [5]},
        {"target_modules": BOTH},
        {"target_modules": ["model.layers.0.q_proj", "q_proj", "v_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}},
        {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.\d\.v_proj": 2}},
        {"target_modules": BOTH, "layers_to_transform": [0, 1]},
        {"target_modules": BOTH, "layers_to_transform": 0},
        {"target_modules": BOTH, "exclude_modules": ["v_proj"]},
        {"target_modules": BOTH, "exclude_modules": "*"},
        {"target_modules": BOTH, "layers_to_transform": "all"},
    ],
    ids=str,
)
def test_modules_that_it_does(config: dict[str, Any], folders: Folders) -> None:
    assert warnings(folders, modules(), modules(), **config) == []


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_that_follows_the_input(tied: bool, folders: Folders) -> None:
    """`ensure_weight_tying` saves both, and the config names one."""
    names = [*modules(), "embed", "lm_head"]
    found = warnings(
        folders, names, names, target_modules=[*BOTH, "embed"], ensure_weight_tying=tied
    )
    assert len(found) == (not tied)


# ------------------------------------------------------------------------------------- too few


@pytest.mark.parametrize("targets", [BOTH, r".*\.(q|v)_proj", ["layers.2.v_proj", *BOTH]], ids=str)
def test_a_layer_that_lacks_one(targets: Any, folders: Folders) -> None:
    (said,) = warnings(folders, modules(), SOME, target_modules=targets)
    assert "/adapter does not adapt module model.layers.2.v_proj, though its config names" in said
    assert "Look at another save of the training" in said


def test_layers_that_lack_all(folders: Folders) -> None:
    (said,) = warnings(folders, modules(), modules([0, 1]), target_modules=BOTH)
    assert "does not adapt 4 modules (model.layers.2.q_proj, " in said


def test_the_bases_names_may_be_others(folders: Folders) -> None:
    """The config speaks of the modules of the model that was trained."""
    base = [name.removeprefix("model.") for name in modules()]
    targets = r"model\.layers\.\d\.[qv]_proj"
    (said,) = warnings(folders, base, SOME, target_modules=targets)
    assert "module model.layers.2.v_proj, though" in said


def test_the_bases_names_may_be_longer(folders: Folders) -> None:
    adapter = [name.removeprefix("model.") for name in SOME]
    targets = r"layers\.\d\.[qv]_proj"
    (said,) = warnings(folders, modules(), adapter, target_modules=targets)
    assert "module layers.2.v_proj, though" in said


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", *(f"layers.{n}.v_proj" for n in (0, 1, 3))]},
        {"target_modules": r".*\.q_proj|.*\.[013]\.v_proj"},
        {"target_modules": BOTH, "exclude_modules": ["layers.2.v_proj"]},
        {"target_modules": BOTH, "exclude_modules": r".*2\.v_proj"},
        {"target_modules": BOTH, "layers_to_transform": [0, 1, 3]},
        {"target_modules": BOTH, "layers_to_transform": 1},
        {"target_modules": BOTH, "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": BOTH, "base_num_hidden_layers": 2},
        {"target_modules": BOTH, "base_num_hidden_layers": 4, "base_num_kv_shared_layers": 2},
        {"target_modules": BOTH, "base_text_config": {"num_hidden_layers": 2}},
    ],
    ids=str,
)
def test_a_layer_that_need_not_have_it(config: dict[str, Any], folders: Folders) -> None:
    """Not named, left out on purpose, or not in the model though on the disk.

    DeepSeek's files end with a layer for multi-token prediction; the last layers of Gemma 4 take
    their keys and values from others.
    """
    assert warnings(folders, modules(), SOME, **config) == []


def test_shared_keys_are_all_that_is_spared(folders: Folders) -> None:
    adapter = [n for n in modules() if n != "model.layers.2.q_proj"]
    config = {"base_num_hidden_layers": 4, "base_num_kv_shared_layers": 2}
    assert len(warnings(folders, modules(), adapter, target_modules=BOTH, **config)) == 1


def test_layers_that_are_promised_beside_others(folders: Folders) -> None:
    config = {"target_modules": BOTH, "layers_to_transform": [1, 2]}
    (said,) = warnings(folders, modules(), ["model.layers.1.v_proj"], **config)
    assert "does not adapt module model.layers.2.v_proj, though" in said


def test_what_no_layer_has_is_not_missed(folders: Folders) -> None:
    """Another tower with layers of the same name, or a module that training could not take."""
    vision = modules(range(3), stack="vision.layers")
    assert warnings(folders, modules() + vision, modules(), target_modules=BOTH) == []


def test_what_is_inside_a_module_trained_in_full(folders: Folders) -> None:
    base = folders.base(modules())
    whole = {"model.layers.2.v_proj.weight": torch.ones(8, 8)}
    config = {"target_modules": BOTH, "modules_to_save": ["layers.2.v_proj"]}
    adapter = folders.adapter(SOME, whole, **config)
    assert weft.plan_merge(base, adapter).warnings == ()


def test_an_adapter_of_weight_zero_is_not_asked(folders: Folders) -> None:
    said = warnings(folders, modules(), SOME, ":0", target_modules=["q_proj"])
    assert not any("target_modules" in warning for warning in said)


def test_experts(folders: Folders) -> None:
    """Each number of the path may be the layer's; both must be promised."""
    base = [f"model.layers.{n}.experts.{m}.up_proj" for n in range(3) for m in range(4)]
    missing = {"model.layers.1.experts.2.up_proj"}
    some = [name for name in base if name not in missing]
    config = {"target_modules": ["up_proj"]}
    (said,) = warnings(folders, base, some, **config)
    assert "module model.layers.1.experts.2.up_proj" in said
    for layers in ([0, 1], [0, 2]):
        folders.root = folders.root / str(layers)
        assert warnings(folders, base, some, **config, layers_to_transform=layers) == []


def test_numbers_of_a_name() -> None:
    assert numbers("model.layers.10.experts.3.w1") == [10, 3]
    assert numbers("lm_head") == []
    assert numbers("a." + "9" * 5000 + ".b") == []


def test_pattern_that_is_none_inside_another(folders: Folders) -> None:
    """PEFT puts it into a longer one."""
    adapter = folders.adapter(rank_pattern={"(?i)q_proj": 2})
    with pytest.raises(weft.WeftError, match=r"rank_pattern = .* must be a mapping of regular"):
        weft.plan_merge(folders.base(), adapter)
