"""What `weft extract` writes, loaded by PEFT: without a warning, and the same model as Weft merges.

Each way in which MergeKit's extraction loses something on toy models has a case here.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import helpers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from tests.extract import vllm_rules as vllm
from tests.oracle import test_experts
from tests.oracle.test_lora_layers import PICTURES, Convolutions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from tests.oracle.conftest import Lab

pytestmark = pytest.mark.oracle
PLAIN = ("llama", "llama-tied", "qwen2", "gpt2", "qwen2-moe", "mixtral")


def tune(base: Path, out: Path, *, only: tuple[str, ...] = ("",), scale: float = 0.02) -> Path:
    """Every floating tensor whose name has one of `only`, moved by noise."""
    shutil.copytree(base, out)
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(out / "model.safetensors")
    for name, value in tensors.items():
        if value.is_floating_point() and any(part in name for part in only):
            noise = scale * torch.randn(value.shape, generator=generator)
            tensors[name] = (value.float() + noise).to(value.dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def extract(base: Path, tuned: Path, **kwargs: Any) -> tuple[Path, dict[str, Any]]:
    out = tuned.parent / "adapter"
    options = {"dtype": "float32", "threads": 2, "rank": 8} | kwargs
    if len({"energy", "size"} & kwargs.keys()):
        del options["rank"]
    report = weft.extract(tuned, base=base, output=out, **options)
    return out, report.manifest


def check_error(base: Path, tuned: Path, merged: Path, manifest: dict[str, Any]) -> None:
    """What Weft merges back is as far from `tuned` as the manifest says, in float64."""
    before, after, back = (helpers.load(folder) for folder in (base, tuned, merged))
    assert back.keys() == after.keys()
    error = sum(float((back[n].double() - after[n].double()).square().sum()) for n in after)
    whole = sum(float((before[n].double() - after[n].double()).square().sum()) for n in after)
    assert (error / whole) ** 0.5 == pytest.approx(
        manifest["totals"]["relative_error"], rel=1e-4, abs=1e-6
    )


def in_peft(model: Any, adapter: Path) -> tuple[Tensor, Tensor]:
    """Logits with the adapter on, and with it merged; any warning fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(model, adapter).eval()
        unmerged = helpers.logits(loaded)
        return unmerged, helpers.logits(loaded.merge_and_unload())


def check(base: Path, adapter: Path, merged: Path, open_model: Callable[[Path], Any]) -> None:
    """PEFT's model and Weft's are the same."""
    want = helpers.logits(open_model(merged))
    unmerged, united = in_peft(open_model(base), adapter)
    assert float((unmerged - want).abs().max()) < 5e-5
    assert float((united - want).abs().max()) < 5e-5
    assert float((helpers.logits(open_model(base)) - want).abs().max()) > 1e-2


def opened(folder: Path) -> Any:
    return helpers.open_model(folder, "AutoModelForCausalLM", dtype=torch.float32)


@pytest.mark.parametrize(
    "kwargs",
    [{"rank": 8}, {"energy": 0.7}, {"embed": "save", "alpha": 20}],
    ids=["rank", "energy", "saved"],
)
@pytest.mark.parametrize("model", PLAIN)
def test_peft_has_the_merged_model(
    lab: Lab, tmp_path: Path, model: str, kwargs: dict[str, Any]
) -> None:
    base = lab.base(model)
    tuned = tune(base, tmp_path / "tuned")
    adapter, manifest = extract(base, tuned, **kwargs)
    assert not manifest["left_out"]
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    check_error(base, tuned, merged, manifest)
    check(base, adapter, merged, opened)
    with_the_keys_in_another_order(adapter)
    assert weft.doctor(adapter, base).verdict == "sound"
    check(base, adapter, merged, opened)


def with_the_keys_in_another_order(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        items = list(config[field].items())
        random.Random(0).shuffle(items)
        config[field] = dict(items)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "kwargs", [{"rank": 6}, {"energy": 0.7}, {"size": "40kB"}], ids=["rank", "energy", "size"]
)
@pytest.mark.parametrize("model", ["gpt-oss", "llama4", "mixtral-square", "mixtral-square-up"])
def test_fused_experts_are_not_lost(tmp_path: Path, model: str, kwargs: dict[str, Any]) -> None:
    made = test_experts.MODELS[model][0]()
    helpers.randomise(made)
    base = tmp_path / "base"
    made.save_pretrained(base)
    tuned = tune(base, tmp_path / "tuned")
    adapter, manifest = extract(base, tuned, **kwargs)
    kinds = [module["kind"] for module in manifest["modules"].values()]
    assert kinds.count("experts") == 4
    if "size" in kwargs:
        assert 35_000 < (adapter / "adapter_model.safetensors").stat().st_size <= 40_000
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    check_error(base, tuned, merged, manifest)

    def same_class(folder: Path) -> Any:
        options = {"dtype": torch.float32, "experts_implementation": "eager"}
        return type(made).from_pretrained(folder, **options).eval()

    check(base, adapter, merged, same_class)


@pytest.mark.parametrize(
    ("options", "rank"), [({"rank": 4}, 7), ({"rank": 9}, 9), ({"energy": 0.5}, 7)]
)
def test_a_rank_of_some_experts_is_that_of_all_and_said(
    tmp_path: Path, options: dict[str, Any], rank: int
) -> None:
    """PEFT has one for all of them: the largest asked for, no other layer padded with zeros."""
    made = test_experts.MODELS["mixtral-square"][0]()
    helpers.randomise(made)
    base = tmp_path / "base"
    made.save_pretrained(base)
    tuned = tune(base, tmp_path / "tuned")
    adapter, manifest = extract(base, tuned, ranks=[("layers.0.mlp.experts", 7)], **options)
    experts = {n: m["rank"] for n, m in manifest["modules"].items() if m["kind"] == "experts"}
    assert set(experts.values()) == {rank}
    (warning,) = (each for each in manifest["warnings"] if "one rank for all" in each)
    assert f"is {rank}, the largest asked for" in warning
    for key, A in load_file(adapter / "adapter_model.safetensors").items():
        if "experts" in key and "lora_A" in key:
            assert bool((A.norm(dim=1) > 0).all())


def test_vllm_is_not_named_for_modules_that_it_has_no_lora_for(lab: Lab, tmp_path: Path) -> None:
    """One rank, nothing in full, and yet no server takes it."""
    base = lab.base("gpt2")
    tuned = tune(base, tmp_path / "tuned")
    adapter, manifest = extract(base, tuned, uniform_rank=True)
    assert vllm.refusals(adapter, base) == ["Conv1D"]
    assert "they have no LoRA for Conv1D" in manifest["serving"]
    assert "vLLM, SGLang and TGI refuse it" in manifest["serving"]


def test_bias_deltas_are_not_lost(lab: Lab, tmp_path: Path) -> None:
    """Of Qwen2: also of a module whose weight did not change."""
    base = lab.base("qwen2")
    tuned = tune(base, tmp_path / "tuned", only=("q_proj.weight", ".bias"))
    adapter, manifest = extract(base, tuned)
    keys = set(load_file(adapter / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias" in keys
    assert "base_model.model.model.layers.0.self_attn.k_proj.bias" in keys
    assert helpers.config_of(adapter)["bias"] == "all"
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    check_error(base, tuned, merged, manifest)
    check(base, adapter, merged, opened)


def test_a_tied_embedding_stays_tied(lab: Lab, tmp_path: Path) -> None:
    """As factors: right in Weft and in PEFT unmerged. PEFT's merge doubles it, which is said."""
    base = lab.base("llama-tied")
    tuned = tune(base, tmp_path / "tuned")
    adapter, manifest = extract(base, tuned, embed="lora")
    assert any("merge_and_unload" in warning for warning in manifest["warnings"])
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    assert "lm_head.weight" not in helpers.load(merged)
    check_error(base, tuned, merged, manifest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(opened(base), adapter).eval()
    off = (helpers.logits(loaded) - helpers.logits(opened(merged))).abs().max()
    assert float(off) < 5e-5


@pytest.mark.parametrize(
    "exclude", ["layers.0.input_layernorm", "layers.1.self_attn", "/layers\\.0\\.(mlp|self_attn)/"]
)
def test_one_layer_is_excluded(lab: Lab, tmp_path: Path, exclude: str) -> None:
    base = lab.base("llama")
    tuned = tune(base, tmp_path / "tuned")
    adapter, manifest = extract(base, tuned, exclude=exclude)
    assert manifest["left_out"]
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    before, after = helpers.load(base), helpers.load(merged)
    same = {name for name in before if helpers.same_bytes(before[name], after[name])}
    assert same == set(manifest["left_out"])
    check(base, adapter, merged, opened)


def test_modules_that_get_no_rank_do_not_come_up(lab: Lab, tmp_path: Path) -> None:
    """MergeKit writes factors of rank 0 for them, which PEFT refuses."""
    base = lab.base("llama")
    tuned = tune(base, tmp_path / "first", only=("q_proj",))
    tuned = tune(tuned, tmp_path / "tuned", only=("mlp", "o_proj"), scale=1e-6)
    adapter, manifest = extract(base, tuned, size="7kB")
    assert {name.split(".")[-2] for name in manifest["modules"]} == {"q_proj"}
    assert len(manifest["left_out"]) == 8
    config = helpers.config_of(adapter)
    assert 0 not in {config["r"], *config["rank_pattern"].values()}
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    check_error(base, tuned, merged, manifest)
    check(base, adapter, merged, opened)


@pytest.mark.parametrize("model", ["llama", "llama-tied"])
def test_tables_that_did_not_change_are_not_in_the_file(
    lab: Lab, tmp_path: Path, model: str
) -> None:
    """Of MergeKit's file for a model of 1 B they are 96 %."""
    base = lab.base(model)
    tuned = tune(base, tmp_path / "tuned", only=("self_attn", "mlp", "norm"))
    adapter, manifest = extract(base, tuned, rank=2)
    keys = load_file(adapter / "adapter_model.safetensors")
    assert not any("embed" in key or "lm_head" in key for key in keys)
    assert not manifest["left_out"]
    check(base, adapter, helpers.weft_merge(base, adapter, tmp_path / "merged"), opened)


DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("tuned_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_any_mix_of_dtypes_and_shards(
    lab: Lab, tmp_path: Path, base_dtype: str, tuned_dtype: str
) -> None:
    helpers.save_base("llama", base_dtype, tmp_path / "base", max_shard_size="40KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    tuned = tune(lab.base("llama", tuned_dtype), tmp_path / "tuned")
    adapter, manifest = extract(tmp_path / "base", tuned)
    merged = helpers.weft_merge(tmp_path / "base", adapter, tmp_path / "merged", dtype="float32")
    check_error(tmp_path / "base", tuned, merged, manifest)
    check(tmp_path / "base", adapter, merged, opened)


def test_a_base_that_is_tied_and_a_tuned_model_that_is_not(lab: Lab, tmp_path: Path) -> None:
    """PEFT warns of a table that is not tied any more, and cannot be told that it is meant so."""
    base = lab.base("llama-tied")
    untied = tmp_path / "untied"
    shutil.copytree(base, untied)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, untied / "model.safetensors", {"format": "pt"})
    config = helpers.config_of(untied) | {"tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(config))
    tuned = tune(untied, tmp_path / "tuned", only=("lm_head", "q_proj"))
    adapter, manifest = extract(base, tuned)
    assert "lm_head.weight" in manifest["saved"]
    assert "model.embed_tokens.weight" not in {*manifest["modules"], *manifest["saved"]}
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    assert helpers.config_of(merged)["tie_word_embeddings"] is False
    check_error(untied, tuned, merged, manifest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(opened(base), adapter).merge_and_unload()
    off = (helpers.logits(theirs) - helpers.logits(opened(merged))).abs().max()
    assert float(off) < 5e-5
    shutil.rmtree(adapter)
    _, asked = extract(base, tuned, embed="lora")
    assert "lm_head.weight" in asked["modules"]
    assert any("adds the factors of each end" in warning for warning in asked["warnings"])


def test_convolutions(tmp_path: Path) -> None:
    """Kernels of two dimensions as factors, others in full."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    base.mkdir()
    model = Convolutions()
    save_file(model.state_dict(), base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text("{}")
    tuned = tune(base, tmp_path / "tuned")
    adapter, manifest = extract(base, tuned, rank=4)
    assert manifest["modules"]["two.weight"]["kind"] == "kernel"
    assert "no LoRA for convolutions" in manifest["serving"]
    assert "a convolution" in vllm.refusals(adapter, base)
    assert {"one.weight", "strided.weight"} <= set(manifest["saved"])
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    check_error(base, tuned, merged, manifest)
    want = Convolutions()
    want.load_state_dict(load_file(merged / "model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        assert float((loaded(PICTURES) - want(PICTURES)).abs().max()) < 1e-5
        united = loaded.merge_and_unload()
        assert float((united(PICTURES) - want(PICTURES)).abs().max()) < 1e-5


@pytest.mark.parametrize("only", [("norm",), ("embed_tokens",), ("q_proj", "layers.1.input")])
def test_modules_are_saved_in_full(lab: Lab, tmp_path: Path, only: tuple[str, ...]) -> None:
    """Also where nothing is decomposed."""
    base = lab.base("llama")
    tuned = tune(base, tmp_path / "tuned", only=only)
    adapter, manifest = extract(base, tuned, save="q_proj, embed_tokens, *norm*")
    assert manifest["totals"]["modules"] == 0
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    after, want = helpers.load(merged), helpers.load(tuned)
    assert all(helpers.same_bytes(after[name], want[name]) for name in want)
    check(base, adapter, merged, opened)


@pytest.mark.parametrize("model", ["llama", "llama-tied"])
def test_a_vocabulary_that_grew(lab: Lab, tmp_path: Path, model: str) -> None:
    base = lab.base(model)
    larger = helpers.open_model(base, "AutoModelForCausalLM")
    larger.resize_token_embeddings(120, mean_resizing=False)
    helpers.randomise(larger, 5)
    larger.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    adapter, _ = extract(base, tmp_path / "tuned", rank=64)
    assert (adapter / "tokenizer.json").exists()
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    after, want = helpers.load(merged), helpers.load(tmp_path / "tuned")
    assert after.keys() == want.keys()
    assert all(float((after[n] - want[n]).abs().max()) < 2e-6 for n in want)
    assert helpers.config_of(merged)["vocab_size"] == 120

    def resized(folder: Path) -> Any:
        made = opened(folder)
        made.resize_token_embeddings(120, mean_resizing=False)
        return made

    check(base, adapter, merged, resized)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_of_a_peft_merge_comes_back(lab: Lab, tmp_path: Path) -> None:
    """Trained and merged by PEFT, extracted: the same rank, the same modules, the same weights."""
    base = lab.base("llama")
    config = {"target_modules": ["q_proj", "down_proj"], "r": 4}
    given = helpers.make_adapter(base, "AutoModelForCausalLM", tmp_path / "given", config=config)
    tuned = helpers.peft_merge(base, "AutoModelForCausalLM", given, tmp_path / "tuned")
    adapter, manifest = extract(base, tuned, rank="auto")
    assert {name.split(".")[-2] for name in manifest["modules"]} == {"q_proj", "down_proj"}
    assert {module["rank"] for module in manifest["modules"].values()} == {4}
    merged = helpers.load(helpers.weft_merge(base, adapter, tmp_path / "merged"))
    want = helpers.load(tuned)
    assert all(float((merged[name] - want[name]).abs().max()) < 1e-6 for name in want)


def test_bare_files_get_the_names_that_transformers_has(tmp_path: Path) -> None:
    """GPT-2's original files lack the prefix of the model with a head."""
    base = helpers.save_base("gpt2", "float32", tmp_path / "base", bare=True)
    tuned = tune(base, tmp_path / "tuned", only=("c_attn", "c_fc", "ln_1"))
    adapter, manifest = extract(base, tuned)
    assert all(name.startswith("transformer.h.") for name in manifest["modules"])
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    check_error(base, tuned, merged, manifest)
    check(base, adapter, merged, opened)
