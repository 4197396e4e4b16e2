"""Each defect that `weft doctor` is for: how it ends, what is said, and what `weft merge` does."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.plan.test_repairs import DISTURBANCES, MODULES, rename
from weft.cli.app import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from tests.conftest import Folders


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is looked at elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and all that is printed."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0), out.getvalue()


@dataclass(frozen=True)
class Defect:
    """An adapter with something wrong, and what becomes of it.

    Attributes:
        make: Writes a base and an adapter.
        code: What `weft doctor` ends with.
        says: Each of these is in what it prints.
        strict: Whether `weft merge` takes it without `--strict` and refuses it with that.
    """

    make: Callable[[Folders], tuple[Path, Path]]
    code: int
    says: tuple[str, ...]
    strict: bool = False


def sound(
    folders: Folders,
    tensors: dict[str, Tensor] | None = None,
    *,
    base: dict[str, Any] | None = None,
    modules: list[str] | None = None,
    **config: Any,
) -> tuple[Path, Path]:
    made = modules or MODULES
    return folders.base(made, **(base or {})), folders.adapter(made, tensors, **config)


def renamed(folders: Folders, *, name: str) -> tuple[Path, Path]:
    base, adapter = sound(folders)
    rename(adapter, DISTURBANCES[name])
    return base, adapter


def changed(
    folders: Folders, *, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> tuple[Path, Path]:
    base, adapter = sound(folders)
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return base, adapter


def other_base(
    folders: Folders, *, shape: tuple[int, int] = (8, 8), layers: int = 2
) -> tuple[Path, Path]:
    kept = [m for m in MODULES if int(m.split(".")[2]) < layers]
    return folders.base([], {f"{m}.weight": torch.ones(shape) for m in kept}), folders.adapter(
        MODULES
    )


def vocabulary(folders: Folders) -> tuple[Path, Path]:
    table = {"model.embed_tokens.weight": torch.ones(9, 8)}
    factors = {
        "model.embed_tokens.lora_embedding_A": torch.ones(2, 12),
        "model.embed_tokens.lora_embedding_B": torch.ones(8, 2),
    }
    return folders.base([], table, vocab_size=9), folders.adapter([], factors)


def experts(folders: Folders, **config: Any) -> tuple[Path, Path]:
    """Of transformers 4, where the base has what transformers 5 has."""
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 16, 8),
        "model.layers.0.mlp.experts.down_proj": torch.ones(2, 8, 8),
    }
    single = [f"model.layers.0.mlp.experts.{n}.{m}" for n in range(2) for m in ("w1", "w3", "w2")]
    return folders.base([], fused, model_type="mixtral"), folders.adapter(single, **config)


def two_readings(folders: Folders) -> tuple[Path, Path]:
    names = ("model.language_model.layers.0.q_proj", "language_model.layers.0.q_proj")
    return folders.base(list(names)), folders.adapter(["model.model.layers.0.q_proj"])


def qwen2_vl(folders: Folders) -> tuple[Path, Path]:
    """The files have the names that the adapter has; the model has others by now."""
    visual = {"visual.merger.weight": torch.ones(8, 8)}
    return folders.base(MODULES, visual, model_type="qwen2_vl"), folders.adapter(MODULES)


def tied(folders: Folders) -> tuple[Path, Path]:
    table = {"model.embed_tokens.weight": torch.ones(9, 8)}
    settings = {"tie_word_embeddings": True, "vocab_size": 9}
    base = folders.base(MODULES, table, architectures=["LlamaForCausalLM"], **settings)
    saved = {"model.embed_tokens.weight": torch.zeros(9, 8)}
    return base, folders.adapter(
        MODULES, saved, modules_to_save=["embed_tokens"], init_lora_weights=True
    )


NORMS = {
    f"model.layers.{n}.{name}.weight": torch.ones(8)
    for n in range(2)
    for name in ("norm", "input_layernorm")
}
BIASES = {f"{module}.bias": torch.ones(8) for module in MODULES}

DEFECTS = {
    "nothing": Defect(sound, 0, ("is sound, and fits",)),
    **{
        name: Defect(partial(renamed, name=name), 1, ("repaired", "can be merged"), strict=True)
        for name in DISTURBANCES
        if name not in ("model-missing", "model-doubled")  # where that is no defect: see names
    },
    "names of before transformers 4.52": Defect(
        qwen2_vl, 1, ("named as transformers before 4.52", "model.language_model.layers.0")
    ),
    "two readings": Defect(
        two_readings, 2, ("could be", "model.language_model.layers.0", " or ")
    ),
    "single experts on a fused base": Defect(experts, 1, ("one by one",), strict=True),
    "the same with rsLoRA": Defect(
        partial(experts, use_rslora=True), 1, ("one by one",), strict=True
    ),
    "two alphas": Defect(
        partial(sound, alpha_pattern={"q_proj": 1, "self_attn.q_proj": 2}),
        2,
        ("patterns of alpha_pattern that say 1 and 2", "leave the right one"),
    ),
    # The rank of a module is that of its tensors: nothing is open.
    "two ranks": Defect(
        partial(sound, rank_pattern={"q_proj": 2, "self_attn.q_proj": 4}), 0, ("is sound",)
    ),
    "modules_to_save that caught more": Defect(
        lambda folders: (
            folders.base(MODULES, NORMS),
            folders.adapter(MODULES, NORMS, modules_to_save=["norm"]),
        ),
        1,
        ("caught 2 modules more", "model.layers.0.input_layernorm"),
    ),
    "biases that were never saved": Defect(
        lambda folders: (
            folders.base(MODULES, BIASES),
            folders.adapter(MODULES, bias="lora_only"),
        ),
        1,
        ("trained them and did not save them",),
    ),
    "another hidden size": Defect(
        partial(other_base, shape=(16, 16)), 2, ("is [16, 16] in the base", "in the same size?")
    ),
    "fewer layers": Defect(partial(other_base, layers=1), 2, ("does not have", "layers.1")),
    "another vocabulary": Defect(vocabulary, 2, ("model.embed_tokens.weight is [9, 8]",)),
    "NaN": Defect(
        partial(changed, change=lambda t: {k: v * torch.nan for k, v in t.items()}), 2, ("NaN",)
    ),
    "all zero": Defect(
        partial(changed, change=lambda t: {k: v * ("lora_A" in k) for k, v in t.items()}),
        1,
        ("changes nothing",),
    ),
    "a half lost": Defect(
        partial(
            changed,
            change=lambda t: {k: v for k, v in t.items() if "0.self_attn.q_proj.lora_B" not in k},
        ),
        2,
        ("lacks lora_B",),
    ),
    "a module that is not named": Defect(
        partial(sound, target_modules=["q_proj"]), 1, ("does not name in target_modules",)
    ),
    "the other end lost": Defect(tied, 1, ("trained lm_head.weight along with",)),
    "a moved base": Defect(
        partial(sound, init_lora_weights="pissa"), 2, ("PiSSA", "--init-adapter")
    ),
    "a quantised base": Defect(
        partial(sound, base={"quantization_config": {"quant_method": "gptq"}}),
        2,
        ("is quantised (GPTQ", "16-bit model"),
    ),
    "no merged weight": Defect(
        partial(sound, peft_type="PROMPT_TUNING"), 2, ("PROMPT_TUNING adapter, which cannot",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_defect(name: str, folders: Folders) -> None:
    defect = DEFECTS[name]
    base, adapter = defect.make(folders)
    code, text = run("doctor", adapter, "--base", base)
    assert code == defect.code, text
    assert [words for words in defect.says if words not in text] == [], text
    same, content = run("doctor", adapter, "--base", base, "--json")
    assert same == code
    assert json.loads(content)["verdict"] == ["sound", "problems", "unusable"][code]
    out = folders.root / "merged"
    merged, said = run("merge", base, adapter, "-o", out, "-q")
    assert merged == (2 if code == 2 else 0), said
    if defect.strict:
        refused, said = run("merge", base, adapter, "-o", folders.root / "strict", "--strict")
        assert (refused, (folders.root / "strict").exists()) == (2, False)
        assert "--fix" in said


def test_what_an_adapter_is(folders: Folders) -> None:
    """On one screen: method, ranks, scaling, targets, layers, dtype, size, PEFT, base, values."""
    adapter = folders.adapter(
        [*MODULES, "model.layers.1.mlp.up_proj"],
        base_model_name_or_path="org/model",
        peft_version="0.21.2",
        use_rslora=True,
    )
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] *= torch.nan
    save_file(tensors, file)
    code, text = run("doctor", adapter)
    assert code == 2
    assert len(text.splitlines()) < 24
    for fact in ("LORA", "rank 2", "alpha 4", "scaling 2.828", "rsLoRA", "q_proj", "v_proj",
                 "up_proj", "2 (0 to 1)", "float32", "0.21.2", "org/model", "NaN"):  # fmt: skip
        assert fact in text, (fact, text)
