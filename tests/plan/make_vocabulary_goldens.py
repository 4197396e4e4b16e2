"""Write vocabulary_goldens.json with the real MergeKit 0.1.5, in an environment that has it.

`python tests/plan/make_vocabulary_goldens.py` (with mergekit, transformers and sentencepiece).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from mergekit.common import ModelReference
from mergekit.tokenizer.build import build_tokenizer
from mergekit.tokenizer.config import TokenizerConfig
from mergekit.tokenizer.embed import PermutedVocabulary
from vocabulary_cases import CASES, GOLDENS, Case, code, write

transformers.logging.set_verbosity_error()


def named(value: Any, folders: dict[str, Path]) -> Any:
    """The settings with the models' names replaced by their folders."""
    if isinstance(value, dict):
        return {
            key: str(folders[each])
            if key in ("source", "model") and isinstance(each, str) and each in folders
            else named(each, folders)
            for key, each in value.items()
        }
    return value


def run(case: Case, root: Path) -> dict[str, Any]:
    """The output's tokens, and by token the embedding's row in every model's new table."""
    folders = {m: write(root / m, files, rows) for m, (files, rows) in case.models.items()}
    models = [ModelReference.parse(str(folder)) for folder in folders.values()]
    base = ModelReference.parse(str(folders[case.base])) if case.base else None
    config = TokenizerConfig.model_validate(named(case.tokenizer, folders))
    info = build_tokenizer(base, models, config.source, False, tuple(config.tokens or ()))
    tables = {
        model: torch.tensor([[code(i, row)] for row in range(rows)], dtype=torch.float64)
        for i, (model, (_, rows)) in enumerate(zip(models, case.models.values(), strict=True))
    }
    task = PermutedVocabulary.model_construct(
        tokens=config.tokens, pad_to_multiple_of=config.pad_to_multiple_of, base_model=base
    )
    object.__setattr__(task, "vocabulary_axis", 0)
    result = task.execute(info, tables)
    numbers = sorted(info.tokenizer.get_vocab().items(), key=lambda e: e[1])
    info.tokenizer.save_pretrained(root / "out")
    saved = json.loads((root / "out" / "tokenizer.json").read_text())["added_tokens"]
    return {
        "tokens": [token for token, _ in numbers],
        "rows": {t: [result[m][n].item() for m in models] for t, n in numbers},
        "padding": [result[m][len(numbers) :].flatten().tolist() for m in models],
        "added": saved,
        "flags": ["id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"],
    }


def main() -> None:
    goldens = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as root:
            try:
                goldens[name] = run(case, Path(root))
            except Exception as error:
                raise RuntimeError(name) from error
    for golden in goldens.values():
        flags = golden.pop("flags")
        golden["added"] = [[entry[flag] for flag in flags] for entry in golden["added"]]
    text = ",\n".join(f"{json.dumps(n)}: {json.dumps(g)}" for n, g in goldens.items())
    Path(__file__).with_name(GOLDENS).write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
