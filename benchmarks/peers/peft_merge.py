"""The merge as PEFT's documentation has it: python peft_merge.py BASE ADAPTER OUT."""

from __future__ import annotations

import json
import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def merge(base: str, adapter: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    begin = time.perf_counter()
    merge(*sys.argv[1:])
    print(json.dumps({"seconds": time.perf_counter() - begin}))
