"""`weft resize`, against the SVD of the dense ΔW in float64, and with real PEFT."""

from __future__ import annotations

import json
import math
import warnings
from typing import TYPE_CHECKING, Any

import helpers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weft
from weft.cli.app import main
from weft.core.errors import NumericsError, OutputError, PlanError, Unsupported, WeftError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

P = "base_model.model."
SHAPES = {"layers.1.up": (40, 24), "layers.11.up": (24, 40), "layers.1.up.down": (8, 30)}
RANK = 12


def factors(shapes: dict[str, tuple[int, int]] = SHAPES, rank: int = RANK) -> dict[str, Tensor]:
    """Of values that fall: the directions matter unequally, and the modules, too."""
    numbers = torch.Generator().manual_seed(0)
    made = {}
    for n, (name, (rows, columns)) in enumerate(shapes.items()):
        fall = (0.6 + 0.1 * n) ** torch.arange(rank)
        made[f"{P}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=numbers)
        made[f"{P}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=numbers) * fall
    return made


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["up"]}
    content["target_modules"] = sorted({n.rpartition(".")[2] for n in SHAPES})
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    return folder


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


def delta(tensors: dict[str, Tensor], name: str, scaling: float = 1) -> Tensor:
    A, B = (tensors[f"{P}{name}.lora_{side}.weight"].double() for side in "AB")
    return scaling * B @ A


def best(dense: Tensor, rank: int) -> float:
    """The error of the best matrix of the rank."""
    return float(np.linalg.norm(np.linalg.svd(dense.numpy(), compute_uv=False)[rank:]))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_error_is_that_of_the_optimum_and_is_stated(
    tmp_path: Path, rank: int, rslora: bool
) -> None:
    old = factors()
    source = write(tmp_path / "a", old, use_rslora=rslora, alpha_pattern={"down": 6})
    report = weft.resize(source, output=tmp_path / "b", rank=rank)
    new, config = read(tmp_path / "b")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    total = lost = 0.0
    for module in report.modules:
        alpha = 6 if module.name.endswith("down") else 2 * RANK
        scaling = alpha / (math.sqrt(RANK) if rslora else RANK)
        dense = delta(old, module.name, scaling)
        error = float((dense - delta(new, module.name)).norm())
        size = float(dense.norm())
        assert error <= best(dense, rank) + 1e-6 * size
        assert module.relative_error == pytest.approx(error / size, rel=1e-6, abs=1e-9)
        kept = 1 - (best(dense, rank) / size) ** 2
        assert module.kept == pytest.approx(kept)
        A, B = (new[f"{P}{module.name}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-5)
        total += size**2
        lost += error**2
    assert report.relative_error == pytest.approx(math.sqrt(lost / total), rel=1e-6)


def test_full_rank_is_the_same_delta(tmp_path: Path) -> None:
    old = factors()
    report = weft.resize(write(tmp_path / "a", old), output=tmp_path / "b", rank=64)
    new, config = read(tmp_path / "b")
    assert config["r"] == RANK
    for name in SHAPES:
        dense = delta(old, name, 2)
        assert float((dense - delta(new, name)).norm()) < 1e-6 * float(dense.norm())
    assert report.relative_error < 1e-6
    assert report.kept == pytest.approx(1)


def test_energy_takes_the_smallest_rank_of_each_module(tmp_path: Path) -> None:
    old = factors()
    report = weft.resize(write(tmp_path / "a", old), output=tmp_path / "b", energy=0.9)
    for module in report.modules:
        values = np.linalg.svd(delta(old, module.name).numpy(), compute_uv=False) ** 2
        shares = np.cumsum(values) / values.sum()
        assert module.rank == int(np.argmax(shares >= 0.9)) + 1
        assert module.kept >= 0.9
    assert len({module.rank for module in report.modules}) > 1


@pytest.mark.parametrize("budget", [6500, 7000, 8200, 10_000, 10**6])
def test_size_is_kept_to_the_byte_and_used(tmp_path: Path, budget: int) -> None:
    source = write(tmp_path / "a", factors())
    report = weft.resize(source, output=tmp_path / "b", size=budget)
    file = tmp_path / "b/adapter_model.safetensors"
    assert file.stat().st_size == report.nbytes <= budget
    units = [4 * (sum(SHAPES[m.name])) for m in report.modules]
    for module, unit in zip(report.modules, units, strict=True):
        full = min(RANK, *SHAPES[module.name])
        assert module.rank == full or file.stat().st_size + unit > budget


def test_size_that_nothing_fits_says_what_would(tmp_path: Path) -> None:
    source = write(tmp_path / "a", factors())
    with pytest.raises(WeftError, match="rank 1 everywhere") as caught:
        weft.resize(source, output=tmp_path / "b", size=100)
    assert not (tmp_path / "b").exists()
    least = int(str(caught.value.hint).split()[3].replace(",", ""))
    assert weft.resize(source, output=tmp_path / "b", size=least).nbytes <= least


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_rounding_of_the_factors_is_in_the_error(tmp_path: Path, dtype: str, bound: float) -> None:
    old = factors()
    report = weft.resize(write(tmp_path / "a", old), output=tmp_path / "b", rank=RANK, dtype=dtype)
    new, _ = read(tmp_path / "b")
    assert {str(tensor.dtype) for tensor in new.values()} == {f"torch.{dtype}"}
    for module in report.modules:
        dense = delta(old, module.name, 2)
        error = float((dense - delta(new, module.name)).norm() / dense.norm())
        assert module.relative_error == pytest.approx(error, rel=1e-6)
        assert 1e-5 < error < bound


def test_overflow_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    old = {key: 1e4 * value for key, value in factors().items()}
    source = write(tmp_path / "a", old, lora_alpha=10**8)
    with pytest.raises(NumericsError, match="overflow"):
        weft.resize(source, output=tmp_path / "b", rank=2, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ------------------------------------------------------------------------------------ what remains


def test_other_tensors_are_copied_byte_for_byte(tmp_path: Path) -> None:
    head = torch.randn(5, 8)
    old = factors() | {f"{P}score.weight": head, f"{P}layers.1.up.base_layer.bias": torch.ones(40)}
    source = write(tmp_path / "a", old, modules_to_save=["score"], bias="lora_only")
    (source / "tokenizer.json").write_text("{}")
    weft.resize(source, output=tmp_path / "b", rank=3)
    new, config = read(tmp_path / "b")
    assert set(new) == set(old)
    assert torch.equal(new[f"{P}score.weight"], head)
    assert torch.equal(new[f"{P}layers.1.up.base_layer.bias"], torch.ones(40))
    assert (config["modules_to_save"], config["bias"]) == (["score"], "lora_only")
    assert (tmp_path / "b/tokenizer.json").read_text() == "{}"


def test_bias_of_lora_takes_the_scaling_in(tmp_path: Path) -> None:
    old = factors()
    for name, (rows, _) in SHAPES.items():
        old[f"{P}{name}.lora_B.bias"] = torch.randn(rows)
    source = write(tmp_path / "a", old, lora_bias=True, lora_alpha=18)
    weft.resize(source, output=tmp_path / "b", rank=3)
    new, _ = read(tmp_path / "b")
    for name in SHAPES:
        key = f"{P}{name}.lora_B.bias"
        assert torch.allclose(new[key], 1.5 * old[key])


def test_zero_and_dependent_factors_have_a_rank(tmp_path: Path) -> None:
    old = factors()
    old[f"{P}layers.11.up.lora_B.weight"] *= 0
    old[f"{P}layers.1.up.lora_A.weight"] = torch.ones(RANK, 24)
    report = weft.resize(write(tmp_path / "a", old), output=tmp_path / "b", energy=1.0)
    ranks = {module.name: module.rank for module in report.modules}
    assert (ranks["layers.11.up"], ranks["layers.1.up"]) == (1, 1)
    new, _ = read(tmp_path / "b")
    assert not delta(new, "layers.11.up").any()
    assert torch.allclose(delta(new, "layers.1.up"), delta(old, "layers.1.up", 2), atol=1e-5)


def test_manifest_and_card_say_it(tmp_path: Path) -> None:
    source = write(tmp_path / "a", factors(), base_model_name_or_path="org/base")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    report = weft.resize(source, output=tmp_path / "b", rank=3)
    manifest = json.loads((tmp_path / "b/weft.json").read_text())
    assert manifest == report.manifest
    assert manifest["operation"] == "resize"
    assert manifest["totals"]["bytes"] == (tmp_path / "b/adapter_model.safetensors").stat().st_size
    assert set(manifest["modules"]) == set(SHAPES)
    errors = [manifest["modules"][name]["relative_error"] for name in manifest["worst"]]
    assert errors == sorted(errors, reverse=True)
    card = (tmp_path / "b/README.md").read_text()
    assert card.startswith("---\nbase_model: org/base\n")
    assert "license: mit" in card
    assert "weft.resize(" in card


# ---------------------------------------------------------------------------------- what is refused


def _dora(tensors: dict[str, Tensor]) -> dict[str, Any]:
    for name, (rows, _) in SHAPES.items():
        tensors[f"{P}{name}.lora_magnitude_vector"] = torch.ones(rows)
    return {"use_dora": True}


def _nan(tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors[f"{P}layers.1.up.lora_A.weight"][0, 0] = math.nan
    return {}


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], type[WeftError], str]] = {
    "dora": (_dora, Unsupported, "DoRA: its magnitude was trained with"),
    "nan": (_nan, PlanError, "1 of 288 values NaN or infinite"),
    "pissa": (lambda _: {"init_lora_weights": "pissa"}, Unsupported, "initialised with PiSSA"),
    "monteclora": (lambda _: {"monteclora_config": {"a": 1}}, Unsupported, "another rank"),
    "qalora": (lambda _: {"use_qalora": True, "qalora_group_size": 2}, Unsupported, "QA-LoRA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    change, error, says = REFUSED[case]
    tensors = factors()
    config = change(tensors)
    source = write(tmp_path / "a", tensors, **config)
    with pytest.raises(error, match=says):
        weft.resize(source, output=tmp_path / "b", rank=2)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing says how small"),
        ({"rank": 2, "energy": 0.5}, "rank and energy are given"),
        ({"rank": 0}, "a rank of 0"),
        ({"energy": 95.0}, "energy is a share"),
        ({"size": "many"}, "cannot read 'many' as a size"),
        ({"rank": 2, "dtype": "int8"}, "unknown output dtype"),
    ],
)
def test_wrong_options_are_said(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    source = write(tmp_path / "a", factors())
    with pytest.raises(WeftError, match=says):
        weft.resize(source, output=tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_output_that_is_there_is_kept_without_force(tmp_path: Path) -> None:
    source = write(tmp_path / "a", factors())
    weft.resize(source, output=tmp_path / "b", rank=4)
    first = (tmp_path / "b/weft.json").read_bytes()
    with pytest.raises(OutputError, match="exists"):
        weft.resize(source, output=tmp_path / "b", rank=2)
    assert (tmp_path / "b/weft.json").read_bytes() == first
    assert weft.resize(source, output=tmp_path / "b", rank=2, force=True).modules[0].rank == 2
    with pytest.raises(OutputError, match="holds the adapter that is read"):
        weft.resize(source, output=source, rank=2, force=True)


def test_input_that_changes_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weft.execute import resize

    source = write(tmp_path / "a", factors())
    honest = resize.resized

    def meddling(*arguments: Any) -> Any:
        config = source / "adapter_config.json"
        config.write_text(config.read_text() + " ")
        return honest(*arguments)

    monkeypatch.setattr(resize, "resized", meddling)
    with pytest.raises(OutputError, match="changed while it was being read"):
        weft.resize(source, output=tmp_path / "b", rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ----------------------------------------------------------------------------------------- in PEFT


class Net(nn.Module):
    """An embedding, a convolution, GPT-2's kind of matrix, and layers whose names are near."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(50, 16)
        self.turned = Conv1D(20, 16)
        self.layers = nn.ModuleList([nn.Linear(20, 20) for _ in range(12)])
        self.kernel = nn.Conv1d(20, 12, 3)
        self.head = nn.Linear(12, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.turned(self.embed(tokens))
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        out: Tensor = self.head(self.kernel(hidden.transpose(1, 2)).mean(-1))
        return out


TOKENS = torch.arange(30).reshape(3, 10)


def trained(folder: Path, **options: Any) -> None:
    """An adapter as PEFT saves it, of random values."""
    targets = ["embed", "turned", "kernel", *(str(n) for n in range(12))]
    config = peft.LoraConfig(r=6, lora_alpha=9, target_modules=targets, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(Net(), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    fall = 0.7 ** torch.arange(parameter.shape[0 if "_A" in name else 1])
                    shape = [1] * parameter.dim()
                    shape[0 if "_A" in name else 1] = -1
                    parameter.copy_(0.3 * torch.randn(parameter.shape) * fall.view(shape))
        model.save_pretrained(folder)


def loaded(folder: Path) -> nn.Module:
    """PEFT's model, which it loads without any warning but those that the old adapter has, too."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        return peft.PeftModel.from_pretrained(Net(), folder)


def test_peft_runs_the_resized_adapter(tmp_path: Path) -> None:
    trained(tmp_path / "a", use_rslora=True, modules_to_save=["head"], rank_pattern={"1": 4})
    old = loaded(tmp_path / "a")(TOKENS)
    weft.resize(tmp_path / "a", output=tmp_path / "same", rank=6)
    assert torch.allclose(loaded(tmp_path / "same")(TOKENS), old, atol=1e-5)
    report = weft.resize(tmp_path / "a", output=tmp_path / "b", energy=0.97)
    assert len({module.rank for module in report.modules}) > 1
    model = loaded(tmp_path / "b")
    for module in report.modules:
        layer = model.get_submodule(f"base_model.model.{module.name}")
        assert layer.r["default"] == module.rank
        assert layer.scaling["default"] == 1
    truth = loaded(tmp_path / "a")
    for module in report.modules:
        one, two = (
            m.get_submodule(f"base_model.model.{module.name}").get_delta_weight("default").double()
            for m in (truth, model)
        )
        error = float((one - two).norm() / one.norm())
        assert module.relative_error == pytest.approx(error, rel=1e-3)
    # What a layer answers is off by no more than the error says.
    inputs = torch.randn(8, 20)
    for module in (m for m in report.modules if m.name.startswith("layers.")):
        with torch.no_grad():
            one, two = (m.get_submodule(P + module.name)(inputs) for m in (truth, model))
        most = module.relative_error * math.sqrt(module.energy) * inputs.norm(dim=1)
        assert bool(((one - two).norm(dim=1) <= most * 1.001 + 1e-5).all())


def test_patterns_hold_in_any_order(tmp_path: Path) -> None:
    """`layers.1` must not take `layers.11`, nor one module what is said of another."""
    trained(tmp_path / "a")
    report = weft.resize(tmp_path / "a", output=tmp_path / "b", energy=0.93)
    path = tmp_path / "b/adapter_config.json"
    config = json.loads(path.read_text())
    assert config["rank_pattern"]
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = dict(reversed(config[field].items()))
    path.write_text(json.dumps(config))
    model = loaded(tmp_path / "b")
    for module in report.modules:
        layer = model.get_submodule(f"base_model.model.{module.name}")
        assert layer.r["default"] == module.rank
    assert weft.doctor(tmp_path / "b").verdict == "sound"


class Experts(nn.Module):
    """Fused experts: two parameters of one module, each with factors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 10, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = torch.einsum("eoi,bi->ebo", self.gate_up, hidden).chunk(2, -1)
        return torch.einsum("eoi,ebi->bo", self.down, gate.tanh() * up)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.last = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.last(self.experts(hidden))
        return out


def test_fused_experts_share_a_rank(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["last"],
        target_parameters=["experts.gate_up", "experts.down"],
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(Mixture(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "a")
    hidden = torch.randn(5, 8)
    torch.manual_seed(0)
    old = peft.PeftModel.from_pretrained(Mixture(), tmp_path / "a")(hidden)
    weft.resize(tmp_path / "a", output=tmp_path / "same", rank=4)
    torch.manual_seed(0)
    same = peft.PeftModel.from_pretrained(Mixture(), tmp_path / "same")(hidden)
    assert torch.allclose(same, old, rtol=1e-4, atol=1e-4)
    report = weft.resize(tmp_path / "a", output=tmp_path / "b", energy=0.8)
    ranks = {module.name: module.rank for module in report.modules}
    assert set(ranks) == {"experts", "last"}
    tensors, _ = read(tmp_path / "b")
    for key, tensor in tensors.items():
        if "experts" in key:
            assert 3 * ranks["experts"] in tensor.shape
    torch.manual_seed(0)
    peft.PeftModel.from_pretrained(Mixture(), tmp_path / "b")(hidden)


# ------------------------------------------------------------------------------------ command line


def test_command_prints_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a", factors())

    def run(*arguments: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["resize", str(source), *arguments])
        assert ended.value.code == 0

    run("--rank", "3", "-o", str(tmp_path / "b"))
    out = capsys.readouterr().out
    assert "3 modules, rank 12 -> 3" in out
    assert "layers.1.up.down" in out
    run("--energy", "0.9", "-o", str(tmp_path / "c"), "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["manifest"]["totals"]["kept"] >= 0.9
    run("--rank", "12", "--dtype", "bfloat16", "-o", str(tmp_path / "e"), "--json")
    totals = json.loads(capsys.readouterr().out)["manifest"]["totals"]
    assert totals["bytes_before"] == (source / "adapter_model.safetensors").stat().st_size
    run("--rank", "2", "-o", str(tmp_path / "d"), "-q")
    assert not capsys.readouterr().out


def test_merges_as_the_model_that_it_states(tmp_path: Path) -> None:
    """Merged into a base of zeros in float32, what is there is ΔW."""
    old = factors()
    source = write(tmp_path / "a", old)
    base = tmp_path / "base"
    base.mkdir()
    zeros = {f"{name}.weight": torch.full(shape, 1e-9) for name, shape in SHAPES.items()}
    save_file(zeros, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text("{}")
    report = weft.resize(source, output=tmp_path / "b", rank=4)
    weft.merge(base, tmp_path / "b", output=tmp_path / "m")
    merged = helpers.load(tmp_path / "m")
    for module in report.modules:
        dense = delta(old, module.name, 2)
        error = float((merged[f"{module.name}.weight"].double() - dense).norm() / dense.norm())
        assert error == pytest.approx(module.relative_error, rel=1e-4)
