"""Initialisations that take their factors off the base: the trained model is the only truth.

PEFT repeats some of them when it loads the adapter, cannot repeat others, and forgets those of
LoRA-GA; what is compared here is the model in memory as training left it.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file

import weft
from tests.oracle.methods import TOKENS, Toy, noise
from weft.core.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

# Of the gradients that LoRA-GA takes before there is an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

MATRICES = ["linear", "square", "wide"]
INITS = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"]
NAMES = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}


def prepared(model: nn.Module, init: str) -> LoraConfig:
    """The config for `init`, once what it needs to know is taken from `model`."""
    special: dict[str, Any] = {}
    if init == "corda":
        special["corda_config"] = CordaConfig(corda_method="kpm")
    if init == "lora_ga":
        special["lora_ga_config"] = LoraGAConfig(direction="ArB2r", scale="stable")
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=MATRICES, init_lora_weights=init, **special
    )
    if init == "corda":
        preprocess_corda(
            model, config, run_model=lambda: [model(TOKENS[n : n + 1]) for n in range(4)]
        )
    if init == "lora_ga":

        def step() -> None:
            with torch.enable_grad():
                model(TOKENS).square().sum().backward()

        preprocess_loraga(model, config, step)
    return config


def train(folder: Path, init: str) -> tuple[nn.Module, nn.Module]:
    """Folders `base`, `initial`, `adapter` and `residual`; -> the plain and the trained model."""
    torch.manual_seed(0)
    plain = Toy()
    model = copy.deepcopy(plain)
    save(folder / "base", plain.state_dict())
    config = prepared(model, init)
    trained = peft.get_peft_model(model, config)
    # As PEFT's documentation has it: the initial adapter is saved as an ordinary one.
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(folder / "initial")
    trained.peft_config["default"].init_lora_weights = init
    noise(trained)
    trained.peft_config["default"].corda_config = None
    trained.save_pretrained(folder / "adapter")
    residual = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for name, value in trained.state_dict().items()
        if ".lora_" not in name
    }
    save(folder / "residual", residual)
    return plain.eval(), trained.eval()


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    tensors = {name: value.detach().clone() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def check(folder: Path, plain: nn.Module, trained: nn.Module) -> None:
    with torch.no_grad():
        want, before = trained(TOKENS), plain(TOKENS)
        plain.load_state_dict(load_file(folder / "model.safetensors"))
        torch.testing.assert_close(plain(TOKENS), want, rtol=1e-4, atol=1e-5)
    assert (want - before).abs().max() > 1e-2


@pytest.mark.parametrize("init", INITS)
def test_initial_adapter(tmp_path: Path, init: str) -> None:
    """W + s · (B A − B₀ A₀) is what was trained; W + s · B A is not."""
    plain, trained = train(tmp_path, init)
    report = weft.merge(
        tmp_path / "base",
        tmp_path / "adapter",
        output=tmp_path / "merged",
        init_adapter=tmp_path / "initial",
    )
    name = next(v for k, v in NAMES.items() if init.startswith(k))
    assert any(f"what {name} took off the base" in note for note in report.manifest["notes"])
    assert "init_adapter=" in report.manifest["command"]
    check(tmp_path / "merged", copy.deepcopy(plain), trained)
    weft.merge(
        tmp_path / "base", tmp_path / "adapter", output=tmp_path / "wrong", init_adapter="none"
    )
    with pytest.raises(AssertionError):
        check(tmp_path / "wrong", plain, trained)


@pytest.mark.parametrize("init", INITS)
def test_residual_base(tmp_path: Path, init: str) -> None:
    plain, trained = train(tmp_path, init)
    report = weft.merge(
        tmp_path / "residual", tmp_path / "adapter", output=tmp_path / "merged", init_adapter="none"
    )
    assert any("base is the model that" in note for note in report.manifest["notes"])
    check(tmp_path / "merged", plain, trained)


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_loaded_by_peft(tmp_path: Path, init: str) -> None:
    """PEFT does PiSSA and OLoRA again, which ends near what was trained; LoRA-GA it does not."""
    plain, trained = train(tmp_path, init)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        off = (loaded(TOKENS) - trained(TOKENS)).abs().max()
    assert off > 1e-3 if init == "lora_ga" else off < 1e-5


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda':UserWarning")
def test_corda_is_not_loaded_by_peft(tmp_path: Path) -> None:
    plain, _ = train(tmp_path, "corda")
    with pytest.raises(ValueError, match="eigens"):
        peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")


def test_weights(tmp_path: Path) -> None:
    """Of 0.5 · ΔW half of the initial factors is taken off, too."""
    train(tmp_path, "pissa")
    weft.merge(
        tmp_path / "base",
        f"{tmp_path / 'adapter'}:0.5",
        output=tmp_path / "merged",
        init_adapter=str(tmp_path / "initial"),
    )
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    factors = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "initial")
    ]
    for name in MATRICES:
        key = f"base_model.model.{name}.lora_"
        first, last = (
            1.5 * f[f"{key}B.weight"].double() @ f[f"{key}A.weight"].double() for f in factors
        )
        want = base[f"{name}.weight"].double() + 0.5 * (first - last)
        torch.testing.assert_close(merged[f"{name}.weight"].double(), want, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------- refused


def edit(folder: Path, **config: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


@pytest.mark.parametrize("init", NAMES)
def test_nothing_is_said_of_the_base(tmp_path: Path, init: str) -> None:
    train(tmp_path, "pissa")
    edit(tmp_path / "adapter", init_lora_weights=init)
    with pytest.raises(PlanError, match=f"initialised with {NAMES[init]}, which moved") as error:
        weft.plan_merge(tmp_path / "base", tmp_path / "adapter")
    assert "--init-adapter PATH" in str(error.value.hint)
    assert "--init-adapter none" in str(error.value.hint)


@pytest.mark.parametrize("given", ["none", "initial"])
def test_base_that_was_not_moved(tmp_path: Path, given: str) -> None:
    train(tmp_path, "pissa")
    edit(tmp_path / "adapter", init_lora_weights=True)
    with pytest.raises(PlanError, match="no adapter was initialised in a way that moves the base"):
        weft.plan_merge(
            tmp_path / "base",
            tmp_path / "adapter",
            init_adapter=given if given == "none" else tmp_path / given,
        )


def test_initial_adapter_of_another_training(tmp_path: Path) -> None:
    train(tmp_path, "pissa")
    file = tmp_path / "initial" / "adapter_model.safetensors"
    tensors = {n: v for n, v in load_file(file).items() if ".wide." not in n}
    save_file(tensors, file, {"format": "pt"})
    edit(tmp_path / "initial", lora_alpha=8)
    with pytest.raises(PlanError) as error:
        plan(tmp_path)
    text = str(error.value)
    assert "changes wide.weight, and" in text
    assert "linear.weight has A [4, 24], B [36, 4] and scaling 1.5 in" in text


def test_initial_adapter_that_is_zero(tmp_path: Path) -> None:
    """Saved from a model that was not initialised so: taking it off would take off nothing."""
    train(tmp_path, "pissa")
    file = tmp_path / "initial" / "adapter_model.safetensors"
    zero = {n: v * ("lora_A" in n) for n, v in load_file(file).items()}
    save_file(zero, file, {"format": "pt"})
    with pytest.raises(PlanError, match="is zero, so no initialisation that moves the base"):
        plan(tmp_path)


def test_dora(tmp_path: Path) -> None:
    """Its norm is that of the moved base: then that one is needed."""
    train(tmp_path, "pissa")
    for name in ("initial", "adapter"):
        edit(tmp_path / name, use_dora=True)
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(file)
        for key in [key for key in tensors if key.endswith("lora_B.weight")]:
            magnitude = torch.ones(tensors[key].shape[0])
            tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = magnitude
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PlanError, match="is dora on a base that PiSSA moved") as error:
        plan(tmp_path)
    assert "--init-adapter none" in str(error.value.hint)


def plan(folder: Path) -> Any:
    return weft.plan_merge(folder / "base", folder / "adapter", init_adapter=folder / "initial")
