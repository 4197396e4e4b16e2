"""LoRA on fused experts: what the trained model computes, unmerged, against what Weft writes.

transformers 5 has the experts of a layer in two tensors and writes most of them one by one, as the
files on the hub are; a base may hold either. Adapters come in both forms as well.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import (
    EXPERTS,
    VOCABULARY,
    WARNINGS,
    load,
    logits,
    peft,
    randomise,
    same_bytes,
    transformers,
    weft_merge,
    write_expert_adapter,
)
from safetensors.torch import load_file, save_file

import weft
from weft.core.blocks import BLOCK, STRIP
from weft.core.errors import FormatError, PlanError, WeftError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from oracle.conftest import Lab

pytestmark = [
    pytest.mark.oracle,
    *map(pytest.mark.filterwarnings, WARNINGS),
    # A false alarm: patterns are compared with modules, and these are for parameters.
    pytest.mark.filterwarnings("ignore:.*rank_pattern.*"),
    pytest.mark.filterwarnings("ignore:.*alpha_pattern.*"),
]

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}


def _mixtral(intermediate: int = 48) -> Any:
    config = transformers.MixtralConfig(
        **_SMALL, intermediate_size=intermediate, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def _qwen2_moe() -> Any:
    config = transformers.Qwen2MoeConfig(
        **_SMALL,
        intermediate_size=64,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def _gpt_oss() -> Any:
    # As in the real one, its down_proj is square.
    config = transformers.GptOssConfig(
        **_SMALL, intermediate_size=32, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def _llama4() -> Any:
    config = transformers.Llama4TextConfig(
        **_SMALL,
        intermediate_size=40,
        intermediate_size_mlp=48,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    )
    return transformers.Llama4ForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "mixtral": (_mixtral, "mlp"),
    "mixtral-square": (lambda: _mixtral(32), "mlp"),
    "mixtral-square-up": (lambda: _mixtral(16), "mlp"),
    "qwen2-moe": (_qwen2_moe, "mlp"),
    "gpt-oss": (_gpt_oss, "mlp"),
    "llama4": (_llama4, "feed_forward"),
}
# Whether the base holds the tensors that transformers has in memory, or those of the hub.
FORMS = [
    *(("mixtral", form) for form in ("hub", "fused")),
    ("mixtral-square", "hub"),
    ("mixtral-square", "fused"),
    ("mixtral-square-up", "hub"),
    ("qwen2-moe", "hub"),
    ("qwen2-moe", "fused"),
    ("gpt-oss", "fused"),
    ("llama4", "fused"),
]


def save_base(model: str, form: str, dtype: str, folder: Path) -> Path:
    made = MODELS[model][0]()
    randomise(made)
    made = made.to(getattr(torch, dtype))
    made.save_pretrained(folder, save_original_format=form == "hub")
    return folder


def save_base_as(model: str, form: str) -> Callable[[Path], Path]:
    """For `Lab.make`."""
    return lambda folder: save_base(model, form, "float32", folder)


def open_base(folder: Path, dtype: str = "auto") -> Any:
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype, experts_implementation="eager")


def train(base: Path, **options: Any) -> Any:
    """A PEFT model on `base` whose adapter is full of random values."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": [], **options})
    model = peft.get_peft_model(open_base(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(0.15 * torch.randn(value.shape, generator=generator))
    return model.eval()


def check(base: Path, adapter: Path, merged: Path, want: Tensor, **options: Any) -> None:
    """Merge, and compare what the output computes with `want`; the form stays that of the base."""
    weft_merge(base, adapter, merged, **options)
    before, after = load(base), load(merged)
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
    got = logits(open_base(merged, "float64"))
    plain = logits(open_base(base, "float64"))
    assert (want - plain).abs().max() > 0.05 * plain.abs().max(), "the adapter does little"
    torch.testing.assert_close(got, want.double(), rtol=1e-5, atol=2e-6)


BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": BOTH},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]},
        {
            "target_parameters": BOTH[::-1],
            "use_rslora": True,
            "rank_pattern": {r".*\.gate_up_proj": 8},
            "alpha_pattern": {r".*\.gate_up_proj": 5},
        },
    ],
    ids=["both", "one", "bare-names", "patterns"],
)
@pytest.mark.parametrize(("model", "form"), FORMS)
def test_trained_model(
    lab: Lab, tmp_path: Path, model: str, form: str, options: dict[str, Any]
) -> None:
    base = lab.make(f"moe-{model}-{form}", lambda f: save_base(model, form, "float32", f))
    trained = train(base, **options)
    trained.save_pretrained(tmp_path / "adapter")
    check(base, tmp_path / "adapter", tmp_path / "merged", logits(trained.double()))


@pytest.mark.parametrize(("model", "form"), [("mixtral", "fused"), ("mixtral", "hub")])
def test_router(lab: Lab, tmp_path: Path, model: str, form: str) -> None:
    """A parameter that is a matrix, in a module that has another name on disk."""
    base = lab.make(f"moe-{model}-{form}", lambda f: save_base(model, form, "float32", f))
    trained = train(base, target_parameters=["gate.weight", "experts.down_proj"])
    trained.save_pretrained(tmp_path / "adapter")
    check(base, tmp_path / "adapter", tmp_path / "merged", logits(trained.double()))


# ------------------------------------------------------------------------------------ bits of PEFT


@pytest.mark.parametrize(("model", "form"), [("mixtral", "fused"), ("gpt-oss", "fused")])
def test_bits_of_peft(lab: Lab, tmp_path: Path, model: str, form: str) -> None:
    base = lab.make(f"moe-{model}-{form}", lambda f: save_base(model, form, "float32", f))
    trained = train(base, target_parameters=BOTH)
    trained.save_pretrained(tmp_path / "adapter")
    merged = load(weft_merge(base, tmp_path / "adapter", tmp_path / "merged"))
    theirs = trained.merge_and_unload().state_dict()
    changed = [n for n in merged if "experts" in n and not n.endswith("bias")]
    assert changed
    for name in changed:
        torch.testing.assert_close(merged[name], theirs[name], rtol=0, atol=3e-7)


@pytest.mark.parametrize("form", ["hub", "fused"])
def test_one_rounding(lab: Lab, tmp_path: Path, form: str) -> None:
    """PEFT rounds the update of a parameter to bfloat16 before it adds it; Weft does not."""
    base = lab.make(f"moe-mixtral-{form}-bf16", lambda f: save_base("mixtral", form, "bfloat16", f))
    trained = train(base, target_parameters=BOTH)
    trained.save_pretrained(tmp_path / "adapter")
    merged = load(weft_merge(base, tmp_path / "adapter", tmp_path / "merged"))
    wide = load(weft_merge(base, tmp_path / "adapter", tmp_path / "wide", dtype="float32"))
    assert any(not same_bytes(merged[n], v) for n, v in load(base).items())
    assert [n for n in merged if not same_bytes(merged[n], wide[n].bfloat16())] == []


@pytest.mark.parametrize(("model", "form"), [("mixtral", "fused"), ("qwen2-moe", "hub")])
def test_blocks_leave_no_trace(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, form: str
) -> None:
    base = lab.make(f"moe-{model}-{form}", lambda f: save_base(model, form, "float32", f))
    adapter = lab.make(
        f"moe-{model}-adapter", lambda f: train(base, target_parameters=BOTH).save_pretrained(f)
    )
    whole = load(weft_merge(base, adapter, tmp_path / "whole"))
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    cut = load(weft_merge(base, adapter, tmp_path / "cut"))
    assert [name for name in whole if not same_bytes(whole[name], cut[name])] == []


# ------------------------------------------------------------------------------- how B is laid out


def regroup(folder: Path, out: Path, experts: int = 4, **config: Any) -> Path:
    """The same adapter with lora_B as older releases of Unsloth wrote it."""
    shutil.copytree(folder, out)
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, B in tensors.items():
        if "experts" in name and "lora_B" in name:
            tensors[name] = B.unflatten(1, (-1, experts)).transpose(1, 2).flatten(1).contiguous()
    save_file(tensors, file, {"format": "pt"})
    edit(out, **config)
    return out


def edit(folder: Path, **config: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def expert_adapter(lab: Lab, model: str = "mixtral", form: str = "hub") -> tuple[Path, Path]:
    base = lab.make(f"moe-{model}-{form}", lambda f: save_base(model, form, "float32", f))
    return base, lab.make(
        f"moe-{model}-adapter", lambda f: train(base, target_parameters=BOTH).save_pretrained(f)
    )


@pytest.mark.parametrize("form", ["hub", "fused"])
@pytest.mark.parametrize("told", ["config", "argument", "against the config"])
def test_grouped_by_expert(lab: Lab, tmp_path: Path, form: str, told: str) -> None:
    base, adapter = expert_adapter(lab, form=form)
    want = load(weft_merge(base, adapter, tmp_path / "want"))
    said = {
        "config": {"lora_B_layout": "grouped_by_expert"},
        "argument": {},
        "against the config": {"lora_B_layout": "rank_major"},
    }[told]
    grouped = regroup(adapter, tmp_path / "grouped", **said)
    options = {} if told == "config" else {"expert_layout": "grouped_by_expert"}
    report = weft.merge(base, grouped, output=tmp_path / "merged", **options)
    merged = load(tmp_path / "merged")
    assert [name for name in want if not same_bytes(merged[name], want[name])] == []
    (note,) = [n for n in report.manifest["notes"] if "lora_B" in n]
    why = "as its config says" if told == "config" else "as asked for"
    assert note.endswith(f"is read as grouped_by_expert, {why}")


def test_layout_that_nobody_says(lab: Lab, tmp_path: Path) -> None:
    base, adapter = expert_adapter(lab)
    (note,) = [n for n in weft.plan_merge(base, adapter).plan.notes if "lora_B" in n]
    assert "is read as rank_major, as PEFT writes it" in note
    shutil.copytree(adapter, tmp_path / "adapter")
    edit(tmp_path / "adapter", lora_B_layout="by_rank")
    with pytest.raises(FormatError, match="must be rank_major or grouped_by_expert"):
        weft.plan_merge(base, tmp_path / "adapter")
    with pytest.raises(WeftError, match="unknown expert layout 'by_rank'"):
        weft.plan_merge(base, adapter, expert_layout="by_rank")


# --------------------------------------------------------------------------------- the orientation


def exchange(folder: Path, out: Path, experts: int = 4, **config: Any) -> Path:
    """The same update as PEFT 0.17 wrote it: A for the outputs, B for the inputs."""
    shutil.copytree(folder, out)
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        A, B = tensors[name], tensors[other]
        rank = A.shape[0] // experts
        by_expert = B.unflatten(1, (rank, experts)).permute(2, 1, 0)  # (E, r, out)
        tensors[name] = by_expert.flatten(0, 1).contiguous()
        tensors[other] = A.unflatten(0, (experts, rank)).permute(2, 1, 0).flatten(1).contiguous()
    save_file(tensors, file, {"format": "pt"})
    edit(out, **config)
    return out


@pytest.mark.parametrize(("model", "form"), [f for f in FORMS if f[0] not in ("gpt-oss", "llama4")])
def test_as_peft_0_17_wrote_it(lab: Lab, tmp_path: Path, model: str, form: str) -> None:
    """By shape; where the weight is square, by the release that the config names."""
    base, adapter = expert_adapter(lab, model, form)
    want = load(weft_merge(base, adapter, tmp_path / "want"))
    old = exchange(adapter, tmp_path / "old", peft_version="0.18.1")
    merged = load(weft_merge(base, old, tmp_path / "merged"))
    with pytest.raises(WeftError, match="depends on the base"):
        weft.doctor(old, fix=tmp_path / "fixed")
    weft.doctor(old, base, fix=tmp_path / "fixed")
    again = load(weft_merge(base, tmp_path / "fixed", tmp_path / "again"))
    for name, value in want.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "version", "same"),
    [
        ("mixtral-square", "0.21.2", True),
        ("mixtral-square", "0.19.1", True),
        ("mixtral-square", "0.19.0", False),
        ("mixtral-square", "0.17.1", False),
        ("gpt-oss", "0.21.2", True),
        ("gpt-oss", "0.19.0", False),
        ("gpt-oss", "0.17.1", True),
        ("gpt-oss", None, True),
    ],
)
def test_square(lab: Lab, tmp_path: Path, model: str, version: str | None, same: bool) -> None:
    """`down_proj` of these is square: its reading is that of the release of PEFT."""
    base, adapter = expert_adapter(lab, model, "fused")
    want = load(weft_merge(base, adapter, tmp_path / "want"))
    shutil.copytree(adapter, tmp_path / "adapter")
    edit(tmp_path / "adapter", peft_version=version)
    merged = load(weft_merge(base, tmp_path / "adapter", tmp_path / "merged"))
    before = load(base)
    for name in [n for n in want if n.endswith("down_proj")]:
        ours, theirs = merged[name] - before[name], want[name] - before[name]
        torch.testing.assert_close(
            ours, theirs if same else theirs.transpose(1, 2), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("missing", ["version", "model_type", "both"])
def test_square_of_which_nothing_is_known(lab: Lab, tmp_path: Path, missing: str) -> None:
    base, adapter = expert_adapter(lab, "mixtral-square", "fused")
    shutil.copytree(adapter, tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "base")
    if missing != "model_type":
        edit(tmp_path / "adapter", peft_version=None)
    if missing != "version":
        file = tmp_path / "base" / "config.json"
        config = {k: v for k, v in json.loads(file.read_text()).items() if k != "model_type"}
        file.write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"down_proj is square.*s · B @ A .* or s · \(B @ A\)ᵀ"):
        weft.plan_merge(tmp_path / "base", tmp_path / "adapter")


# ---------------------------------------------------------- single experts in, fused ones on disk


@pytest.mark.parametrize(("model", "names"), [("mixtral", "mixtral"), ("qwen2-moe", "qwen2-moe")])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"w3": 9}}])
def test_single_experts_on_a_fused_base(
    lab: Lab, tmp_path: Path, model: str, names: str, options: dict[str, Any]
) -> None:
    hub = lab.make(f"moe-{model}-hub", lambda f: save_base(model, "hub", "float32", f))
    fused = lab.make(f"moe-{model}-fused", lambda f: save_base(model, "fused", "float32", f))
    adapter = write_expert_adapter(hub, tmp_path / "adapter", names=EXPERTS[names])
    edit(adapter, **options)
    weft_merge(hub, adapter, tmp_path / "one-by-one")
    want = logits(open_base(tmp_path / "one-by-one", "float64"))
    if model == "qwen2-moe":  # whose shared expert has modules of the same names, a matrix each
        assert any("shared_expert.up_proj.lora_A" in name for name in load(adapter))
    check(fused, adapter, tmp_path / "merged", want)


def test_experts_that_were_left_out(lab: Lab, tmp_path: Path) -> None:
    """Experts and parts without factors stay as they were."""
    hub = lab.make("moe-mixtral-hub", lambda f: save_base("mixtral", "hub", "float32", f))
    fused = lab.make("moe-mixtral-fused", lambda f: save_base("mixtral", "fused", "float32", f))
    adapter = write_expert_adapter(hub, tmp_path / "adapter", names=EXPERTS["mixtral"])
    file = adapter / "adapter_model.safetensors"
    kept = {n: v for n, v in load_file(file).items() if ".experts.2." in n and ".w3." in n}
    save_file(kept, file, {"format": "pt"})
    merged = load(weft_merge(fused, adapter, tmp_path / "merged"))
    for name, before in load(fused).items():
        changed = (merged[name] != before).nonzero()
        if not name.endswith("gate_up_proj"):
            assert not len(changed)
            continue
        assert set(changed[:, 0].tolist()) == {2}
        assert min(changed[:, 1].tolist()) == before.shape[1] // 2


@pytest.mark.parametrize("number", ["02", "²", "٢"])
def test_experts_that_are_no_numbers(lab: Lab, tmp_path: Path, number: str) -> None:
    """Else two keys would be one expert, and one of them lost."""
    hub = lab.make("moe-mixtral-hub", lambda f: save_base("mixtral", "hub", "float32", f))
    fused = lab.make("moe-mixtral-fused", lambda f: save_base("mixtral", "fused", "float32", f))
    adapter = write_expert_adapter(hub, tmp_path / "adapter", names=EXPERTS["mixtral"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors |= {
        n.replace(".experts.2.", f".experts.{number}."): v.clone()
        for n, v in tensors.items()
        if ".0.mlp.experts.2." in n or ".0.block_sparse_moe.experts.2." in n
    }
    save_file(tensors, file, {"format": "pt"})
    for base in (hub, fused):
        with pytest.raises(PlanError, match=r"which .* does not have"):
            weft.plan_merge(base, adapter)


def convert(base: Path, adapter: Path, folder: Path) -> Any:
    """What PEFT makes of an adapter of single experts under transformers 5, saved by it."""
    model = peft.PeftModel.from_pretrained(open_base(base), adapter).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("form", ["hub", "fused"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_converted_by_peft(lab: Lab, tmp_path: Path, form: str, stabilised: bool) -> None:
    """What was trained; what PEFT computes, √2 too much with rsLoRA; what Weft writes."""
    hub = lab.make("moe-mixtral-hub", lambda f: save_base("mixtral", "hub", "float32", f))
    base = lab.make(f"moe-mixtral-{form}", lambda f: save_base("mixtral", form, "float32", f))
    adapter = write_expert_adapter(hub, tmp_path / "adapter", names=EXPERTS["mixtral"])
    edit(adapter, use_rslora=stabilised)
    model = convert(base, adapter, tmp_path / "converted")
    assert any("base_layer" in name for name in load(tmp_path / "converted"))
    weft_merge(hub, adapter, tmp_path / "one-by-one")
    trained = logits(open_base(tmp_path / "one-by-one", "float64"))
    theirs = logits(model.double())
    off = (theirs - trained).abs().max() / trained.abs().max()
    assert off > 1e-3 if stabilised else off < 1e-5
    check(base, tmp_path / "converted", tmp_path / "merged", trained)
    notes = weft.plan_merge(base, tmp_path / "converted").plan.notes
    assert any("√2 too large" in note for note in notes) == stabilised


def test_trained_on_after_the_conversion(lab: Lab, tmp_path: Path) -> None:
    """Then PEFT's scaling is what it was trained with."""
    base = lab.make("moe-mixtral-hub", lambda f: save_base("mixtral", "hub", "float32", f))
    adapter = write_expert_adapter(base, tmp_path / "adapter", names=EXPERTS["mixtral"])
    edit(adapter, use_rslora=True)
    model = convert(base, adapter, tmp_path / "converted")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.add_(0.05)
    model.save_pretrained(tmp_path / "trained")
    check(base, tmp_path / "trained", tmp_path / "merged", logits(model.double()))


# ----------------------------------------------------------------------------------------- refused


def test_another_base(lab: Lab) -> None:
    """Every layer is looked at, and the shapes on both sides are said."""
    _, adapter = expert_adapter(lab, "qwen2-moe", "hub")
    other = lab.make("moe-mixtral-hub", lambda f: save_base("mixtral", "hub", "float32", f))
    with pytest.raises(PlanError) as error:
        weft.plan_merge(other, adapter)
    text = str(error.value)
    assert "fit none of down_proj or gate_up_proj of model.layers.0" in text
    assert "lora_A.weight [16, 32]" in text
    assert "experts.0.w1.weight [48, 32]" in text
    assert "and 1 more like it" in text


def test_rank_that_the_config_does_not_say(lab: Lab, tmp_path: Path) -> None:
    base, adapter = expert_adapter(lab)
    shutil.copytree(adapter, tmp_path / "adapter")
    edit(tmp_path / "adapter", r=3)
    with pytest.raises(
        PlanError, match=r"has 16 rows, and adapter_config\.json says r = 3 for each"
    ):
        weft.plan_merge(base, tmp_path / "adapter")


def test_variant_that_parameters_do_not_have(lab: Lab, tmp_path: Path) -> None:
    base, adapter = expert_adapter(lab)
    shutil.copytree(adapter, tmp_path / "adapter")
    edit(tmp_path / "adapter", use_dora=True)
    with pytest.raises(PlanError, match="PEFT does not combine with use_dora"):
        weft.plan_merge(base, tmp_path / "adapter")


def test_number_of_experts(lab: Lab, tmp_path: Path) -> None:
    base, adapter = expert_adapter(lab)
    shutil.copytree(adapter, tmp_path / "adapter")
    edit(tmp_path / "adapter", r=8)
    with pytest.raises(PlanError, match="fit none of"):
        weft.plan_merge(base, tmp_path / "adapter")


def test_wrapped_twice_without_parameters(lab: Lab, tmp_path: Path) -> None:
    base, adapter = expert_adapter(lab)
    shutil.copytree(adapter, tmp_path / "adapter")
    edit(tmp_path / "adapter", target_parameters=None)
    with pytest.raises(PlanError, match="names no target_parameters that would do so"):
        weft.plan_merge(base, tmp_path / "adapter")


def test_layout_where_there_are_no_experts(lab: Lab, tmp_path: Path) -> None:
    base = lab.make("moe-mixtral-hub", lambda f: save_base("mixtral", "hub", "float32", f))
    train(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(PlanError, match="no adapter is one of fused experts"):
        weft.plan_merge(base, tmp_path / "adapter", expert_layout="rank_major")


def test_bare_names_fit_every_module(lab: Lab, tmp_path: Path) -> None:
    """Without a base an ordinary layer is shown as one."""
    base = lab.make("moe-mixtral-hub", lambda f: save_base("mixtral", "hub", "float32", f))
    options = {"target_parameters": ["gate_up_proj"], "target_modules": ["q_proj"]}
    train(base, **options).save_pretrained(tmp_path / "adapter")
    kinds = {(e.target, e.kind) for e in weft.inspect(tmp_path / "adapter").entries}
    assert ("model.layers.0.self_attn.q_proj.weight", "lora") in kinds
    assert ("model.layers.0.mlp.experts.gate_up_proj", "lora_experts") in kinds
