"""Other methods than LoRA on models of transformers: merged they give what they gave before.

The formulas are looked at in a file per method; here it is names, Conv1D and tied embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch

from tests.helpers import MODELS, WARNINGS, logits, open_model, open_peft, save_base, weft_merge
from tests.oracle.methods import noise

if TYPE_CHECKING:
    from pathlib import Path

    from tests.oracle.conftest import Lab

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]

LLAMA = {"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"]}
TOKENS = {"token_indices": [3, 50, 111]}
CASES = [
    ("llama", "LoKr", {"r": 4, **LLAMA}),
    ("llama", "AdaLora", {"init_r": 4, "total_step": 9, "lora_alpha": 6, **LLAMA}),
    ("llama", "IA3", {"feedforward_modules": ["down_proj"], **LLAMA}),
    ("llama", "Vera", {"r": 8, "save_projection": False, **LLAMA}),
    ("llama", "HRA", {"r": 4, **LLAMA}),
    ("llama", "Hira", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    ("llama", "Miss", {"r": 7, **LLAMA}),
    ("llama", "LNTuning", {"target_modules": ["norm", "post_attention_layernorm"]}),
    ("llama-tied", "TrainableTokens", {**TOKENS}),
    ("llama-tied", "Hira", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    ("gpt2", "AdaLora", {"init_r": 4, "total_step": 9, "lora_alpha": 6, **GPT2}),
    ("gpt2", "IA3", {"feedforward_modules": ["c_fc"], **GPT2}),
    ("gpt2", "Vera", {"r": 8, "save_projection": False, **GPT2}),
    ("gpt2", "Pvera", {"r": 8, **GPT2}),
    ("gpt2", "Hira", {"r": 4, **GPT2}),
    ("gpt2", "Gralora", {"r": 4, "hybrid_r": 2, "alpha": 4, **GPT2}),
    ("gpt2", "TrainableTokens", {"target_modules": ["wte"], **TOKENS}),
]


@pytest.mark.parametrize(
    ("model", "method", "options"), CASES, ids=[f"{model}-{method}" for model, method, _ in CASES]
)
@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A:UserWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_logits(lab: Lab, tmp_path: Path, model: str, method: str, options: dict[str, Any]) -> None:
    bare = model == "gpt2"  # as its original files are
    name = f"{model}-float32{'-bare' if bare else ''}"
    base = lab.make(name, lambda folder: save_base(model, "float32", folder, bare=bare))
    auto = MODELS[model].auto
    torch.manual_seed(0)
    config = getattr(peft, f"{method}Config")(**options)
    trained = peft.get_peft_model(open_model(base, auto), config)
    noise(trained, scale=0.3)
    trained.save_pretrained(tmp_path / "adapter")
    weft_merge(base, tmp_path / "adapter", tmp_path / "merged")
    expected = logits(open_peft(base, auto, tmp_path / "adapter"))
    merged = logits(open_model(tmp_path / "merged", auto))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (merged - logits(open_model(base, auto))).abs().max() > 1e-2
