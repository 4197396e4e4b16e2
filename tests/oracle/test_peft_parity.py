"""Merged weights against PEFT's merge, bit by bit, and against float64.

PEFT's default merge of a matrix is float32 arithmetic and one rounding, as Weft's is: the bytes
must be equal. Where PEFT rounds twice (an embedding's ΔW goes to the base's dtype first) or merges
a tied weight twice over, the yardstick is float64 alone.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import (
    DTYPES,
    EXPERTS,
    MODELS,
    WARNINGS,
    check_rounding,
    exact,
    load,
    make_adapter,
    peft_merge,
    randomise,
    same_bytes,
    save_base,
    transformers,
    weft_merge,
    write_expert_adapter,
)
from safetensors.torch import load_file, save_file

import weft
from oracle.cases import CASES, Case, each, named
from weft.core.blocks import BLOCK, STRIP

if TYPE_CHECKING:
    from pathlib import Path

    from oracle.conftest import Lab

pytestmark = [pytest.mark.oracle, *map(pytest.mark.filterwarnings, WARNINGS)]


@dataclass(frozen=True)
class Run:
    """One case in one dtype: the folders."""

    base: Path
    adapter: Path
    merged: Path


def run(lab: Lab, case: Case, dtype: str) -> Run:
    base = lab.base(case.model, dtype)
    name = f"{case.id}-{dtype}"
    adapter = lab.make(
        f"{name}-adapter", make_adapter, base, case.auto, config=case.config, rows=case.rows
    )
    return Run(base, adapter, lab.make(f"{name}-merged", weft_merge, base, adapter))


each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_dtype
@each()
def test_float64(lab: Lab, case: Case, dtype: str) -> None:
    made = run(lab, case, dtype)
    base, merged = load(made.base), load(made.merged)
    head, embedding = "lm_head.weight", MODELS[case.model].embedding
    tied = {} if head in base else {head: embedding}
    want = exact(base, [(made.adapter, 1)], tied=tied)
    if case.apart:
        # An end without a delta is the base's still, or the table that the adapter brings along.
        brought = [v for k, v in load(made.adapter).items() if k.endswith(".base_layer.weight")]
        base |= dict.fromkeys((head, embedding), brought[0] if brought else base[embedding])
    assert set(merged) == set(base)
    off = elements = 0
    for name, value in merged.items():
        assert value.dtype == base[name].dtype
        if name not in want:
            assert same_bytes(value, base[name]), name
            continue
        assert not same_bytes(value, base[name]), f"{name} shows no update"
        off += check_rounding(value, want[name], name)
        elements += value.numel()
    if dtype == "bfloat16" and elements >= 50_000:
        assert off <= 1e-4 * elements


@each_dtype
@each([case for case in CASES if not case.broken])
def test_bits_of_peft(lab: Lab, case: Case, dtype: str) -> None:
    made = run(lab, case, dtype)
    theirs = load(
        lab.make(
            f"{case.id}-{dtype}-peft",
            lambda folder: peft_merge(made.base, case.auto, made.adapter, folder, rows=case.rows),
        )
    )
    merged = load(made.merged)
    differing = [
        name
        for name, value in merged.items()
        if not name.endswith(case.unlike) and not same_bytes(value, theirs[name])
    ]
    assert not differing


@each()
def test_no_doubts(lab: Lab, case: Case) -> None:
    """Whatever PEFT saved is what its config says."""
    made = run(lab, case, "bfloat16")
    assert weft.plan_merge(made.base, made.adapter).warnings == ()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*\.(q_proj|up_proj)"},
        {"target_modules": ["q_proj", "layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*0\.self_attn\.v_proj"},
        {"target_modules": ["up_proj"], "modules_to_save": ["layers.1.mlp.up_proj"]},
    ],
    ids=str,
)
def test_no_doubts_of_a_choice(lab: Lab, tmp_path: Path, config: dict[str, Any]) -> None:
    base, auto = lab.base("llama", "bfloat16"), MODELS["llama"].auto
    adapter = make_adapter(base, auto, tmp_path / "adapter", config=config)
    assert weft.plan_merge(base, adapter).warnings == ()


# ------------------------------------------------------------------------- what leaves bits alone


@each(
    named(
        *("linear-llama", "dora-llama", "linear-gpt2", "dora-gpt2", "lora-bias-bert"),
        *("embedding-lora-llama", "embedding-dora-llama", "tokens-llama", "both-lora-llama-tied"),
    )
)
def test_blocks_leave_no_trace(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """Tensors as small as these are one block each; cut as finely as may be, the bits stay."""
    made = run(lab, case, "bfloat16")
    whole = load(made.merged)
    monkeypatch.setitem(BLOCK, "cpu", 1)
    monkeypatch.setitem(STRIP, "cpu", 1)
    cut = load(weft_merge(made.base, made.adapter, tmp_path / "merged"))
    # The norm of columns is a sum over blocks: in float64, and so the same to the last bit or two.
    assert [name for name in whole if not same_bytes(whole[name], cut[name])] == []


@each(named("linear-llama"))
@pytest.mark.parametrize("limit", [None, "60kB"])
def test_shards(lab: Lab, tmp_path: Path, case: Case, limit: str | None) -> None:
    made = run(lab, case, "bfloat16")
    base = save_base(case.model, "bfloat16", tmp_path / "base", max_shard_size="40kB")
    assert len(list(base.glob("*.safetensors"))) > 2
    merged = weft_merge(base, made.adapter, tmp_path / "merged", max_shard_size=limit)
    single, sharded = load(made.merged), load(merged)
    assert set(single) == set(sharded)
    assert [name for name in single if not same_bytes(single[name], sharded[name])] == []
    shards = {file.name for file in merged.glob("*.safetensors")}
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    for file in shards:
        held = set(load_file(merged / file))
        assert held == {name for name, home in index["weight_map"].items() if home == file}
    if limit is None:
        assert shards == {file.name for file in base.glob("*.safetensors")}
    else:
        assert max((merged / file).stat().st_size for file in shards) < 70_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_in_sixteen_bits(lab: Lab, tmp_path: Path, dtype: str) -> None:
    """Factors are widened, whatever they are stored in: PEFT does so, too."""
    (case,) = named("linear-llama")
    made = run(lab, case, "bfloat16")
    adapter = tmp_path / "adapter"
    shutil.copytree(made.adapter, adapter)
    narrow = {name: value.to(getattr(torch, dtype)) for name, value in load(adapter).items()}
    save_file(narrow, adapter / "adapter_model.safetensors", {"format": "pt"})
    merged = load(weft_merge(made.base, adapter, tmp_path / "merged"))
    theirs = load(peft_merge(made.base, case.auto, adapter, tmp_path / "peft"))
    base = load(made.base)
    want = exact(base, [(adapter, 1)])
    assert any(not same_bytes(merged[name], value) for name, value in load(made.merged).items())
    for name, value in merged.items():
        assert same_bytes(value, theirs[name])
        if name in want:
            check_rounding(value, want[name], name)


# --------------------------------------------------------------------------------------- by hand


@each_dtype
@pytest.mark.parametrize("model", EXPERTS)
def test_single_experts(lab: Lab, model: str, dtype: str) -> None:
    """The layout before transformers 5, one matrix an expert, which the files still have."""
    name = f"{model}-{dtype}"
    base = lab.base(model, dtype)
    adapter = lab.make(f"{name}-experts", write_expert_adapter, base, names=EXPERTS[model])
    merged = load(lab.make(f"{name}-experts-merged", weft_merge, base, adapter))
    before = load(base)
    want = exact(before, [(adapter, 1)])
    experts = 4 * 2 * 3 + (2 * 3 if model == "qwen2-moe" else 0)
    assert len(want) == experts
    assert set(merged) == set(before)
    for tensor, value in merged.items():
        if tensor in want:
            assert not same_bytes(value, before[tensor])
            check_rounding(value, want[tensor], tensor)
        else:
            assert same_bytes(value, before[tensor])


PAIRS = [
    ("linear-llama", "rslora-llama"),
    ("linear-llama", "dora-llama"),
    ("dora-gpt2", "linear-gpt2"),
    ("positions-lora-gpt2", "linear-gpt2"),
    ("embedding-lora-llama", "embedding-dora-llama"),
    ("bias-all-bert", "lora-bias-bert"),
    ("norms-saved-llama", "head-saved-llama"),
    ("tokens-llama", "embedding-saved-llama"),
]


@each_dtype
@pytest.mark.parametrize(("one", "other"), PAIRS, ids=map(" and ".join, PAIRS))
def test_two_adapters(lab: Lab, tmp_path: Path, one: str, other: str, dtype: str) -> None:
    """W + 0.7 · ΔW₁ + 0.3 · ΔW₂: every ΔW is taken from the same W, one rounding at the end."""
    first, second = (run(lab, case, dtype) for case in named(one, other))
    adapters = [f"{first.adapter}:0.7", f"{second.adapter}:0.3"]
    merged = load(weft_merge(first.base, adapters, tmp_path / "merged"))
    base = load(first.base)
    want = exact(base, [(first.adapter, 0.7), (second.adapter, 0.3)])
    assert set(merged) == set(base)
    for name, value in merged.items():
        if name in want:
            assert not same_bytes(value, base[name])
            check_rounding(value, want[name], name)
        else:
            assert same_bytes(value, base[name])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_of_several_blocks(tmp_path: Path, threads: int) -> None:
    """Matrices of real proportions, which are cut; PEFT multiplies them in one go."""
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=768,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    model = transformers.LlamaForCausalLM(config)
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base, auto = tmp_path / "base", MODELS["llama"].auto
    targets = [*MODELS["llama"].linear, "lm_head"]
    adapter = make_adapter(
        base, auto, tmp_path / "adapter", config={"target_modules": targets, "r": 64}
    )
    merged = load(weft_merge(base, adapter, tmp_path / "merged"))
    torch.set_num_threads(threads)
    try:
        theirs = load(peft_merge(base, auto, adapter, tmp_path / "peft"))
    finally:
        torch.set_num_threads(1)
    assert [name for name, value in merged.items() if not same_bytes(value, theirs[name])] == []
    want = exact(load(base), [(adapter, 1)])
    assert len(want) == len(targets)
    off = sum(check_rounding(merged[name], tensor, name) for name, tensor in want.items())
    assert off <= 1e-4 * sum(tensor.value.numel() for tensor in want.values())
