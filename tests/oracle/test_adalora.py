"""AdaLoRA against PEFT, in float64, bit by bit and by the forward pass."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import AdaLoraConfig

from tests.oracle.methods import TOKENS, Case, Turned, noise, refusal

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # PEFT's own false alarms: it knows its masks, and a module whose budget is 0 is no broken save.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor"),
]

config = partial(
    AdaLoraConfig,
    init_r=6,
    target_r=3,
    total_step=10,
    lora_alpha=5,
    target_modules=["linear", "square", "conv2", "point"],
)


MASKS = {
    "linear": [True, True, False, True, False, True],
    "square": [False, False, True, False, False, False],
    "point": [False] * 6,
}


def pruned(model: Any, scale: float = 0.1) -> None:
    """As after the budget was cut: ranks of 4, 1 and 0, the others whole."""
    noise(model, scale=scale)
    model.peft_config["default"].rank_pattern = {}
    for name, mask in MASKS.items():
        module = model.get_submodule(f"base_model.model.{name}")
        if hasattr(module, "lora_E"):
            module.lora_E["default"].data[~torch.tensor(mask)] = 0
            model.peft_config["default"].rank_pattern[f"{name}.lora_E.default"] = mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("train", "options"),
    [(noise, {}), (pruned, {}), (noise, {"lora_alpha": -1})],
    ids=["whole", "pruned", "no-alpha"],
)
def test_merges(tmp_path: Path, dtype: torch.dtype, train: Any, options: dict[str, Any]) -> None:
    case = Case(config(**options), dtype, train)
    case.run(tmp_path)
    if (dtype, train) != (torch.bfloat16, pruned):  # PEFT rounds what it resizes to the base's type
        case.check_bits(tmp_path)


def test_merges_conv1d(tmp_path: Path) -> None:
    case = Case(config(target_modules=["c_fc", "c_proj"]), model=Turned)
    case.run(tmp_path)
    case.check_bits(tmp_path)


def test_merges_beside_trained_tokens(tmp_path: Path) -> None:
    Case(config(trainable_token_indices={"embed": [3, 17]})).run(tmp_path)


def test_pruned_without_alpha(tmp_path: Path) -> None:
    """Trained with a scaling of init_r: that is merged. PEFT scales by the rank that is left."""
    outputs = []

    def train(model: Any) -> None:
        pruned(model, scale=0.5)
        with torch.no_grad():
            outputs.append(model.eval()(TOKENS))

    case = Case(config(lora_alpha=0, target_modules=["linear", "square"]), train=train)
    case.merge(tmp_path)
    torch.testing.assert_close(case.forward(case.merged), outputs[0], rtol=1e-4, atol=1e-4)
    # PEFT, from what it saved itself:
    assert (case.unmerged(tmp_path) - outputs[0]).abs().max() > 1e-3
    assert (case.forward(case.peft_merged(tmp_path)) - outputs[0]).abs().max() > 1e-3


def test_refuses(tmp_path: Path) -> None:
    key = "base_model.model.square.lora_E"
    assert "lacks lora_E" in refusal(config(), tmp_path / "missing", lambda t: t.pop(key))
    message = refusal(config(), tmp_path / "cut", lambda t: t.update({key: torch.ones(5, 1)}))
    assert "module 'square'" in message
    assert "lora_E [5, 1]" in message
    assert "has rank 6, and" in refusal(config(), tmp_path / "rank", init_r=7)
    masks = {"square.lora_E": [True, False]}
    assert "has rank 6, and" in refusal(config(), tmp_path / "mask", rank_pattern=masks)
    assert "lists of true and false" in refusal(config(), tmp_path / "form", rank_pattern={"a": 3})
    assert "replicates layers" in refusal(config(), tmp_path / "more", layer_replication=[[0, 1]])


def test_config_is_what_peft_writes(tmp_path: Path) -> None:
    Case(config(), train=pruned).run(tmp_path)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(written["rank_pattern"]) == {"linear.lora_E", "square.lora_E", "point.lora_E"}
