"""What a merged model computes against what the trained one did, unmerged.

The oracle is the model in memory with its adapter beside the weights, as training leaves it: it
knows what the adapter meant even where PEFT's merge, or its loading, does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers import (
    EXPERTS,
    MODELS,
    WARNINGS,
    config_of,
    load,
    logits,
    open_model,
    open_peft,
    save_base,
    train,
    weft_merge,
    write_expert_adapter,
)
from safetensors.torch import save_file

from oracle.cases import CASES, Case, each, named
from weft.core.errors import PlanError, WeftError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from oracle.conftest import Lab

pytestmark = [pytest.mark.oracle, *map(pytest.mark.filterwarnings, WARNINGS)]

# Of the largest logit. Both models compute in float64, so what differs is that W′ was rounded to
# float32, by 6e-8 of each weight.
TOLERANCE = 1e-6


def merged_logits(folder: Path, auto: str, *, spare: Sequence[str] = (), **kwargs: Any) -> Tensor:
    """Of the output, loaded by name: every tensor but `spare` finds its place, none is made up."""
    model, info = open_model(folder, auto, "float64", output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) == set(spare)
    return logits(model)


def check(
    base: Path,
    adapter: Path,
    merged: Path,
    auto: str,
    want: Tensor,
    *,
    dtype: str | None = None,
    **kwargs: Any,
) -> Path:
    """Merge, and compare what the output computes with `want`."""
    weft_merge(base, adapter, merged, dtype=dtype)
    got = merged_logits(merged, auto, **kwargs)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()
    return merged


def trained(base: Path, case: Case, adapter: Path, **kwargs: Any) -> Tensor:
    """The logits of the trained model, unmerged, once its adapter is saved."""
    model = train(base, case.auto, case.config, rows=case.rows, **kwargs)
    model.save_pretrained(adapter)
    want = logits(model.double())
    if not case.rows:
        before = logits(open_model(base, case.auto))
        assert (want - before).abs().max() > 0.1 * before.abs().max(), "the adapter does little"
    return want


def check_config(case: Case, base: Path, merged: Path) -> None:
    """What a loader reads: transformers 5 would guess right without it, others would not."""
    before, after = config_of(base), config_of(merged)
    expected = dict(before)
    if case.apart:
        expected["tie_word_embeddings"] = False
    if case.rows:
        expected["vocab_size"] = case.rows
    assert after == expected


def check_case(base: Path, case: Case, folder: Path, dtype: str | None = None, **kw: Any) -> None:
    """Train, merge in `folder`, and compare the two; `kw` is for the training."""
    want = trained(base, case, folder / "adapter", **kw)
    merged = check(base, folder / "adapter", folder / "merged", case.auto, want, dtype=dtype)
    if dtype is None:
        check_config(case, base, merged)


@each()
def test_trained_model(lab: Lab, tmp_path: Path, case: Case) -> None:
    check_case(lab.base(case.model), case, tmp_path)


@each([case for case in CASES if case.model == "gpt2"])
def test_original_gpt2(lab: Lab, tmp_path: Path, case: Case) -> None:
    """GPT-2's own file: `h.0…` for what the adapter calls `transformer.h.0…`, and masks in it."""
    base = lab.make("gpt2-bare", save_base, "gpt2", "float32", bare=True)
    check_case(base, case, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each(
    named(
        *("linear-gpt2", "dora-qwen2", "embedding-lora-bert", "both-lora-llama-tied"),
        *("tokens-llama-tied", "together-saved-llama-tied", "resized-head-lora-llama-tied"),
    )
)
def test_sixteen_bit_base_written_wide(lab: Lab, tmp_path: Path, case: Case, dtype: str) -> None:
    check_case(lab.base(case.model, dtype), case, tmp_path, dtype="float32")


# ---------------------------------------------------------------------------- tied, and then not


def test_tied_factors_that_training_made_differ(lab: Lab, tmp_path: Path) -> None:
    """On a 16-bit base PEFT casts the two sets of factors apart, and trains both.

    `ensure_weight_tying` is in the config all the same. What was trained has two deltas.
    """
    (case,) = named("together-lora-llama-tied")
    check_case(lab.base(case.model, "bfloat16"), case, tmp_path, dtype="float32", tie=False)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_head_saved_beside_trained_tokens_of_a_tied_model(lab: Lab, tmp_path: Path) -> None:
    """PEFT saves such an adapter without the head that it trained, and cannot load it."""
    base = lab.base("llama-tied")
    config = {
        "target_modules": ["o_proj"],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [90, 3],
    }
    adapter = tmp_path / "adapter"
    train(base, "AutoModelForCausalLM", config).save_pretrained(adapter)
    with pytest.raises(WeftError, match=r"lm_head\.token_adapter"):
        weft_merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_resize_that_peft_saved_by_half(lab: Lab, tmp_path: Path, target: str) -> None:
    """LoRA on one end of an untied, resized model: PEFT leaves the other's new rows out."""
    base = lab.base("llama")
    adapter = tmp_path / "adapter"
    config = {"target_modules": [target]}
    train(base, "AutoModelForCausalLM", config, rows=121).save_pretrained(adapter)
    with pytest.raises(PlanError, match="resizes the vocabulary of some tensors and not of all"):
        weft_merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("rows", [None, 121], ids=["", "resized"])
@pytest.mark.parametrize(
    ("saved", "target"), [("embed_tokens", "lm_head"), ("lm_head", "embed_tokens")]
)
@pytest.mark.parametrize("model", ["llama", "llama-tied"])
def test_one_end_saved_and_lora_on_the_other(
    lab: Lab, tmp_path: Path, model: str, saved: str, target: str, rows: int | None
) -> None:
    """Two tensors, whatever they were before: one trained in full, the other with a ΔW."""
    config = {"target_modules": [target], "modules_to_save": [saved]}
    case = Case("ends", model, config, rows=rows, apart=model == "llama-tied")
    check_case(lab.base(model), case, tmp_path)


# ---------------------------------------------------------------------------------- other layouts


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)
def test_adapter_of_single_experts(lab: Lab, tmp_path: Path) -> None:
    """PEFT fuses the factors as transformers 5 fuses the experts; on disk neither is fused.

    (Of Qwen2-MoE it drops those of the experts without a word, so that one is not here.)
    """
    base = lab.base("mixtral")
    adapter = lab.make("mixtral-experts", write_expert_adapter, base, names=EXPERTS["mixtral"])
    auto = MODELS["mixtral"].auto
    want = logits(open_peft(base, auto, adapter).double())
    before = logits(open_model(base, auto))
    assert (want - before).abs().max() > 0.1 * before.abs().max()
    check(base, adapter, tmp_path / "merged", auto, want)


def _without_head(folder: Path) -> Path:
    """BERT with its prefix and without a classifier, as a pretraining checkpoint is."""
    save_base("bert-classifier", "float32", folder)
    kept = {name: value for name, value in load(folder).items() if not name.startswith("class")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("layout", ["bare", "prefix", "prefix-and-head"])
def test_classifier_on_bert(lab: Lab, tmp_path: Path, layout: str, use_dora: bool) -> None:
    """A new head comes with the adapter; `bert.` may be missing from the checkpoint's names."""
    base = {
        "bare": lambda: lab.base("bert"),
        "prefix": lambda: lab.make("bert-headless", _without_head),
        "prefix-and-head": lambda: lab.base("bert-classifier"),
    }[layout]()
    config = {
        "target_modules": list(MODELS["bert"].linear),
        "task_type": "SEQ_CLS",
        "use_dora": use_dora,
    }
    auto = MODELS["bert-classifier"].auto
    model = train(base, auto, config)
    model.save_pretrained(tmp_path / "adapter")
    want = logits(model.double())
    merged = check(base, tmp_path / "adapter", tmp_path / "merged", auto, want)
    assert set(load(merged)) == set(load(base)) | {"classifier.weight", "classifier.bias"}


def test_bert_adapter_on_a_prefixed_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """An adapter of BertModel, whose names have no `bert.`, on a checkpoint that has it."""
    base = lab.make("bert-headless", _without_head)
    config = {"target_modules": ["query", "dense", "word_embeddings"], "bias": "all"}
    model = train(base, "AutoModel", config)
    model.save_pretrained(tmp_path / "adapter")
    want = logits(model.double())
    merged = check(base, tmp_path / "adapter", tmp_path / "merged", "AutoModel", want)
    assert set(load(merged)) == set(load(base))


@pytest.mark.parametrize(("model", "spare"), [("llama", ["lm_head.weight"]), ("llama-tied", [])])
def test_classifier_on_a_decoder(lab: Lab, tmp_path: Path, model: str, spare: list[str]) -> None:
    """`score` in place of `lm_head`, which stays in the files."""
    base = lab.base(model)
    config = {"target_modules": ["q_proj", "down_proj"], "task_type": "SEQ_CLS"}
    auto, padding = "AutoModelForSequenceClassification", {"pad_token_id": 0}
    trained_model = train(base, auto, config, **padding)
    trained_model.save_pretrained(tmp_path / "adapter")
    want = logits(trained_model.double())
    check(base, tmp_path / "adapter", tmp_path / "merged", auto, want, spare=spare, **padding)


# ------------------------------------------------------------------------------------- several


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_two_adapters_with_weights(lab: Lab, tmp_path: Path, model: str) -> None:
    """PEFT's `cat` of two LoRAs is the exact sum, with the weights in the factors."""
    auto = MODELS[model].auto
    base = lab.base(model)
    folders = [tmp_path / "one", tmp_path / "other"]
    targets = list(MODELS[model].linear)
    train(base, auto, {"target_modules": targets}).save_pretrained(folders[0])
    other = {"target_modules": targets[:2], "r": 3, "lora_alpha": 4}
    train(base, auto, other, seed=2).save_pretrained(folders[1])
    both = open_peft(base, auto, folders[0])
    both.load_adapter(folders[1], "other")
    both.add_weighted_adapter(["default", "other"], [0.7, 0.3], "sum", combination_type="cat")
    both.set_adapter("sum")
    weft_merge(base, [f"{folders[0]}:0.7", f"{folders[1]}:0.3"], tmp_path / "merged")
    want, got = logits(both.double()), merged_logits(tmp_path / "merged", auto)
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()
