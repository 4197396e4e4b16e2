"""What must hold of every method, whatever its formula: each with all tensors that it may have."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from tests.oracle.methods import Case, Toy, Turned, refusal
from weft.core.blocks import BLOCK, STRIP
from weft.deltas import silent
from weft.formats.adapters import open_adapter
from weft.formats.adapters._peft_methods import methods

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) p?vera_A:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning"),
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT:UserWarning"),
]

LINEAR = {"target_modules": ["linear", "square", "wide"]}
ALL = {"target_modules": ["linear", "square", "wide", "conv1", "conv2", "point"]}
NO_CONV1D = {"target_modules": ["linear", "square", "wide", "conv2", "point"]}
CONV1D = {"target_modules": ["c_fc", "c_proj"]}

# Name -> (config, base); the configs are made when a test asks, since some of them warn.
METHODS: dict[str, tuple[Any, Any]] = {
    "ADALORA": (partial(peft.AdaLoraConfig, init_r=6, total_step=9, **NO_CONV1D), Toy),
    "ADALORA turned": (partial(peft.AdaLoraConfig, init_r=6, total_step=9, **CONV1D), Turned),
    "BEFT": (partial(peft.BeftConfig, target_modules=["linear", "wide"]), Toy),
    "BOFT": (partial(peft.BOFTConfig, boft_block_size=4, **LINEAR), Toy),
    "C3A": (partial(peft.C3AConfig, block_size=12, **LINEAR), Toy),
    "DEFT": (partial(peft.DeftConfig, r=4, **LINEAR), Toy),
    "DELORA": (partial(peft.DeloraConfig, r=4, **LINEAR), Toy),
    "FOURIERFT": (partial(peft.FourierFTConfig, n_frequency=50, **LINEAR), Toy),
    "FROD": (partial(peft.FrodConfig, progressbar=False, **LINEAR), Toy),
    "FROD turned": (partial(peft.FrodConfig, progressbar=False, **CONV1D), Turned),
    "GLORA": (partial(peft.GloraConfig, r=3, **LINEAR), Toy),
    "GRALORA": (partial(peft.GraloraConfig, r=6, gralora_k=3, hybrid_r=2, **LINEAR), Toy),
    "GRALORA turned": (partial(peft.GraloraConfig, r=4, hybrid_r=2, **CONV1D), Turned),
    "HIRA": (partial(peft.HiraConfig, r=4, target_modules=["embed", *ALL["target_modules"]]), Toy),
    "HIRA turned": (partial(peft.HiraConfig, r=4, **CONV1D), Turned),
    "HRA": (partial(peft.HRAConfig, r=5, **NO_CONV1D), Toy),
    "IA3": (partial(peft.IA3Config, feedforward_modules=["conv2", "wide"], **NO_CONV1D), Toy),
    "IA3 turned": (partial(peft.IA3Config, feedforward_modules=["c_fc"], **CONV1D), Turned),
    "LN_TUNING": (partial(peft.LNTuningConfig, target_modules=["norm", "conv2"]), Toy),
    "LOHA": (partial(peft.LoHaConfig, r=4, use_effective_conv2d=True, **ALL), Toy),
    "LOKR": (
        partial(peft.LoKrConfig, r=2, use_effective_conv2d=True, decompose_both=True, **ALL),
        Toy,
    ),
    "LOKR full": (partial(peft.LoKrConfig, r=8, **ALL), Toy),
    "MISS": (partial(peft.MissConfig, r=5, **LINEAR), Toy),
    "MISS bat": (partial(peft.MissConfig, r=4, init_weights="bat", **LINEAR), Toy),
    "MISS mini": (partial(peft.MissConfig, r=5, mini_r=6, init_weights="mini", **LINEAR), Toy),
    "OFT": (partial(peft.OFTConfig, r=0, oft_block_size=4, **LINEAR), Toy),
    "OSF": (partial(peft.OSFConfig, effective_rank=4, **LINEAR), Toy),
    "PEANUT": (partial(peft.PeanutConfig, r=4, depth=2, **LINEAR), Toy),
    "PVERA": (partial(peft.PveraConfig, r=5, **LINEAR), Toy),
    "PVERA turned": (partial(peft.PveraConfig, r=5, **CONV1D), Turned),
    "RANDLORA": (partial(peft.RandLoraConfig, r=4, randlora_alpha=6, **LINEAR), Toy),
    "ROAD": (partial(peft.RoadConfig, group_size=6, **LINEAR), Toy),
    "SHIRA": (partial(peft.ShiraConfig, r=2, **LINEAR), Toy),
    "SUPERTUNING": (partial(peft.SupertuningConfig, sparsity=0.9, r=4, **LINEAR), Toy),
    "TRAINABLE_TOKENS": (
        partial(peft.TrainableTokensConfig, token_indices=[39, 2, 20], target_modules=["embed"]),
        Toy,
    ),
    "TINYLORA": (partial(peft.TinyLoraConfig, u=4, **LINEAR), Toy),
    "TINYLORA turned": (partial(peft.TinyLoraConfig, u=4, **CONV1D), Turned),
    "UNILORA": (partial(peft.UniLoraConfig, r=4, save_indices=True, **LINEAR), Toy),
    "VBLORA": (partial(peft.VBLoRAConfig, num_vectors=9, vector_length=12, topk=2, **LINEAR), Toy),
    "VERA": (partial(peft.VeraConfig, r=5, **LINEAR), Toy),
    "VERA turned": (partial(peft.VeraConfig, r=5, save_projection=False, **CONV1D), Turned),
    "WAVEFT": (partial(peft.WaveFTConfig, n_frequency=50, **LINEAR), Toy),
}
# Sums over inputs or outputs, in an order that BLAS chooses by the number of rows.
BLAS_CHOOSES = ("BOFT", "DEFT", "GRALORA", "HRA", "OFT", "PEANUT")
# Of which no tensor that is zero makes ΔW zero.
LOUD = (
    *("BOFT", "DEFT", "FROD", "GLORA", "GRALORA", "HRA", "IA3", "LN_TUNING", "OSF", "PEANUT"),
    *("ROAD", "TINYLORA", "TRAINABLE_TOKENS", "VBLORA"),
)
EACH = pytest.mark.parametrize("name", METHODS)


def test_every_method_is_here() -> None:
    assert set(methods()) - {"BONE"} == {name.split()[0] for name in METHODS}


def merge(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Case:
    config, model = METHODS[name]
    case = Case(config(), dtype, model=model)
    case.merge(folder)
    return case


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """Rows at a time, some of them by other threads, give the bits that all at once give."""
    whole = merge(name, tmp_path, dtype).merged
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "pieces", threads=2)
    for key, value in load_file(tmp_path / "pieces" / "model.safetensors").items():
        if name in BLAS_CHOOSES:
            torch.testing.assert_close(value, whole[key], msg=key)
        else:
            assert torch.equal(value, whole[key]), key


@EACH
def test_by_weight(tmp_path: Path, name: str) -> None:
    """Half of it is half of its ΔW; and twice half of it, all of it."""
    whole = merge(name, tmp_path).merged
    base, half = load_file(tmp_path / "base" / "model.safetensors"), f"{tmp_path / 'adapter'}:0.5"
    for adapters, share in (([half], 0.5), ([half, half], 1.0)):
        out = tmp_path / str(share)
        weft.merge(tmp_path / "base", adapters, output=out)
        for key, value in load_file(out / "model.safetensors").items():
            expected = base[key] + share * (whole[key] - base[key])
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=key)


@EACH
def test_float64(tmp_path: Path, name: str) -> None:
    """One float64 tensor makes the arithmetic float64: it is not done in float32 underneath."""
    merge(name, tmp_path)
    model = {
        key: value.double() if value.is_floating_point() else value
        for key, value in load_file(tmp_path / "base" / "model.safetensors").items()
    }
    save_file(model, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "wide")
    config, factory = METHODS[name]
    exact = Case(config(), model=factory).peft_merged(tmp_path, torch.float64)
    # PEFT's Fourier transforms, its DEFT and the U of its FRoD are float32 in any case.
    single = name.split()[0] in ("C3A", "DEFT", "FOURIERFT", "FROD")
    close = {"rtol": 1e-5, "atol": 1e-5} if single else {"rtol": 1e-11, "atol": 1e-12}
    for key, value in load_file(tmp_path / "wide" / "model.safetensors").items():
        torch.testing.assert_close(value, exact[key].to(value.dtype), **close, msg=key)


@EACH
def test_nan_is_found(tmp_path: Path, name: str) -> None:
    """In every tensor of the file, before anything is written, and by its name."""
    config, model = METHODS[name]
    merge(name, tmp_path / "good")
    names = load_file(tmp_path / "good" / "adapter" / "adapter_model.safetensors")
    for n, key in enumerate(key for key, value in names.items() if value.is_floating_point()):

        def spoil(tensors: dict[str, torch.Tensor], key: str = key) -> None:
            tensors[key].view(-1)[-1] = torch.nan

        assert key in refusal(config(), tmp_path / str(n), spoil, model)


@EACH
def test_missing_tensors_are_named(tmp_path: Path, name: str) -> None:
    """A module of which one tensor is gone is refused, by name (one that has no other is gone)."""
    config, model = METHODS[name]
    merge(name, tmp_path / "good")
    names = list(load_file(tmp_path / "good" / "adapter" / "adapter_model.safetensors"))
    modules = [key.removesuffix(".weight").rpartition(".")[0] for key in names]
    if name in ("LN_TUNING", "LOHA", "LOKR", "RANDLORA", "TRAINABLE_TOKENS"):
        return  # of which a part may be a whole
    for n, (key, module) in enumerate(zip(names, modules, strict=True)):
        if modules.count(module) > 1:
            message = refusal(config(), tmp_path / str(n), lambda t, key=key: t.pop(key), model)
            assert "lacks" in message


@EACH
def test_what_is_zero_is_told(tmp_path: Path, name: str) -> None:
    """Whichever role of a kind is said to silence it does so, and a warning says it first."""
    merge(name, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    base, trained = load_file(tmp_path / "base" / "model.safetensors"), load_file(file)
    entries = open_adapter(tmp_path / "adapter", "adapter").entries
    roles = [
        [ref.name for role, ref in entry.tensors if role in silent(entry.kind)] for entry in entries
    ]
    if not all(roles):
        assert name.split()[0] in LOUD
        return
    for number in range(max(map(len, roles))):
        chosen = {names[number % len(names)] for names in roles}
        save_file({k: v * (k not in chosen) for k, v in trained.items()}, file, {"format": "pt"})
        out = tmp_path / str(number)
        report = weft.merge(tmp_path / "base", tmp_path / "adapter", output=out, dtype="float32")
        assert any("adapter changes nothing: a factor" in said for said in report.warnings)
        for key, value in load_file(out / "model.safetensors").items():
            assert torch.equal(value, base[key]), (key, chosen)
