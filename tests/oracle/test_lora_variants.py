"""Variants of LoRA against PEFT, in float64 and by the forward pass."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file

import weft
from tests.oracle.methods import TOKENS, Case, Toy, noise
from weft.core.blocks import BLOCK, STRIP
from weft.core.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = [torch.float32, torch.bfloat16]
# One wide, one tall, one square.
MATRICES = ["linear", "square", "head"]


def variant(dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": MATRICES, **options}
    return Case(LoraConfig(**settings), dtype)


# -------------------------------------------------------------------------------------------- KaSA


@pytest.mark.parametrize("dtype", DTYPES)
def test_kasa(tmp_path: Path, dtype: torch.dtype) -> None:
    """The base loses its smallest singular values, and B @ diag(d) @ A is added."""
    case = variant(dtype, kasa_config=KasaConfig(), use_rslora=dtype == torch.float32)
    case.run(tmp_path)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("lora_diag") for name in names)


def test_kasa_loses_rank(tmp_path: Path) -> None:
    """Where nothing was learnt, the truncation is all that is left."""
    case = variant(kasa_config=KasaConfig())
    case.train = lambda model: None
    case.run(tmp_path)
    for name in MATRICES:
        values = torch.linalg.svdvals(case.merged[f"{name}.weight"].double())
        assert values[-4:].max() < 1e-6 < 1e-3 < values[-5]


def test_kasa_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    variant(kasa_config=KasaConfig()).run(tmp_path)


def test_kasa_without_diagonal(tmp_path: Path) -> None:
    variant(kasa_config=KasaConfig()).run(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {n: v for n, v in load_file(file).items() if "square.lora_diag" not in n}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PlanError, match=r"'square' .* has no lora_diag, and kasa_config is"):
        weft.plan_merge(tmp_path / "base", tmp_path / "adapter")


# ----------------------------------------------------------------------------------------- BD-LoRA


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("a", "b"), [(["linear"], ["square"]), (["ear", "quar"], ["embedded"])])
def test_block_diagonal(tmp_path: Path, dtype: torch.dtype, a: list[str], b: list[str]) -> None:
    """PEFT rounds the update to the base's dtype before it adds it; the yardstick is float64."""
    blocks = BdLoraConfig(
        target_modules_bd_a=a, target_modules_bd_b=b, nblocks=2, match_strict=False
    )
    variant(dtype, use_bdlora=blocks).run(tmp_path)


def test_block_diagonal_of_another_number(tmp_path: Path) -> None:
    blocks = BdLoraConfig(target_modules_bd_a=["linear"], target_modules_bd_b=["square"], nblocks=2)
    variant(use_bdlora=blocks, target_modules=["linear", "square"]).run(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"nblocks": 2', '"nblocks": 4'))
    with pytest.raises(PlanError) as error:
        weft.plan_merge(tmp_path / "base", tmp_path / "adapter")
    assert "do not share a rank" in str(error.value)


# ----------------------------------------------------------------------------------------- QA-LoRA


def pooled(folder: Path, group: int) -> tuple[Toy, Any]:
    """Folders `base` and `adapter`; -> the plain model and the trained one.

    PEFT has QA-LoRA for layers of GPTQ alone; here its forward pass is put on plain ones.
    """
    torch.manual_seed(0)
    base = Toy()
    (folder / "base").mkdir()
    save_file(base.state_dict(), folder / "base" / "model.safetensors", {"format": "pt"})
    # `wide` has A for all of its inputs, as a layer has that is not quantised.
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["linear", "square", "wide"],
        use_qalora=True,
        qalora_group_size=group,
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name in ("linear", "square"):
        layer = model.base_model.model.get_submodule(name)
        QALoraLinearVariant.init(layer, "default", config)
        layer.lora_variant["default"] = QALoraLinearVariant()
    noise(model)
    model.save_pretrained(folder / "adapter")
    return base, model.eval()


@pytest.mark.parametrize("group", [2, 6])
def test_pooled_inputs(tmp_path: Path, group: int) -> None:
    base, model = pooled(tmp_path, group)
    report = weft.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "merged")
    assert any("QA-LoRA is trained on a quantised base" in n for n in report.manifest["notes"])
    plain = copy.deepcopy(base).eval()
    with torch.no_grad():
        want = model(TOKENS)
        before = plain(TOKENS)
        plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
        torch.testing.assert_close(plain(TOKENS), want, rtol=1e-4, atol=1e-5)
    assert (want - before).abs().max() > 1e-3
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(f'_size": {group}', '_size": 3'))
    with pytest.raises(PlanError, match="do not fit it"):
        weft.plan_merge(tmp_path / "base", tmp_path / "adapter")


# ------------------------------------------------------------------------- plain LoRA, once trained


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"monteclora_config": MontecloraConfig()}, "lora_monteclora_sampler"),
        ({"velora_config": VeloraConfig(num_groups=2)}, "lora_velora_embed"),
        ({"init_lora_weights": "orthogonal"}, None),
        ({"init_lora_weights": "gaussian"}, None),
    ],
    ids=["monteclora", "velora", "orthogonal", "gaussian"],
)
def test_plain_once_trained(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any], part: str | None
) -> None:
    case = variant(dtype, target_modules=["linear", "square"], **options)
    case.run(tmp_path)
    theirs = case.peft_merged(tmp_path)
    if "init_lora_weights" not in options or dtype == torch.float32:
        assert all(torch.equal(case.merged[n], theirs[n]) for n in case.merged)
    unused = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    unused = [name for name in unused if part and part in name]
    assert bool(unused) == bool(part)
    notes = weft.plan_merge(tmp_path / "base", tmp_path / "adapter").plan.notes
    said = f"{len(unused)} tensors serve training alone and have no part in the merged weight"
    assert (said in notes) == bool(part)


def test_mica(tmp_path: Path) -> None:
    """Its B are singular vectors of W and stay so; PEFT has it in float32 and below."""

    class InFloat32(Case):
        def peft_merged(self, folder: Path, dtype: Any = None) -> dict[str, torch.Tensor]:
            merged = super().peft_merged(folder)
            return {n: v.to(dtype) for n, v in merged.items()} if dtype else merged

    settings = {"r": 4, "lora_alpha": 6, "target_modules": [*MATRICES, "embed"]}
    case = InFloat32(LoraConfig(init_lora_weights="mica", **settings))
    case.run(tmp_path)
    theirs = case.peft_merged(tmp_path)
    assert all(torch.equal(case.merged[n], theirs[n]) for n in case.merged)


def test_two_variants_at_once(tmp_path: Path) -> None:
    """PEFT has no such layer: one of the two would be left out."""
    variant(use_dora=True, target_modules=["linear"]).run(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"use_qalora": false', '"use_qalora": true'))
    with pytest.raises(PlanError, match="use_dora and use_qalora, which PEFT does not combine"):
        weft.plan_merge(tmp_path / "base", tmp_path / "adapter")


def test_training_of_another_variant(tmp_path: Path) -> None:
    """What only training needs is known by the config: without it the tensors are unknown."""
    case = variant(target_modules=["linear"], velora_config=VeloraConfig(num_groups=2))
    case.run(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"velora_config"', '"peft_note"'))
    with pytest.raises(PlanError, match=r"lora_velora_embed.* has no ending that weft knows"):
        weft.plan_merge(tmp_path / "base", tmp_path / "adapter")
