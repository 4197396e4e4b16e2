"""Extraction from vision-language models, whose files name modules otherwise than their memory."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import helpers
import peft
import pytest
import torch
import transformers

from tests.oracle.test_extract_loads import check_error, extract, tune

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.oracle

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 90, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 4,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=vision
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def llava() -> Any:
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=vision, image_token_index=3
    )
    return transformers.LlavaForConditionalGeneration(config)


def tied() -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=vision, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [qwen2_vl, llava, tied])
def test_peft_finds_every_module(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    base = tmp_path / "base"
    model.save_pretrained(base)
    tuned = tune(base, tmp_path / "tuned")
    adapter, manifest = extract(base, tuned)
    assert not manifest["left_out"]
    merged = helpers.weft_merge(base, adapter, tmp_path / "merged")
    check_error(base, tuned, merged, manifest)
    want = type(model).from_pretrained(merged, dtype=torch.float32).state_dict()
    fresh = type(model).from_pretrained(base, dtype=torch.float32)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(fresh, adapter).merge_and_unload()
    found = loaded.state_dict()
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=name)
        assert not torch.equal(value, before[name]), name
