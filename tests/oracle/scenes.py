"""Scenes for the table in `docs/reference/adapters.md`: an adapter each, and what becomes of it.

A scene is a base, an adapter that real PEFT trained (or another tool's, or a damaged one), and what
base and adapter together computed in training: the truth of both columns.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import helpers
import peft
import torch
from safetensors.torch import load_file, save_file

import weft
from tests.oracle import (
    methods,
    test_experts,
    test_lora_layers,
    test_merged_lora,
    test_moved_base,
)
from tests.plan.test_repairs import DISTURBANCES, rename
from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

AUTO = "AutoModelForCausalLM"
P = "base_model.model."


@dataclass
class Scene:
    """A base and an adapter in folders of those names.

    Attributes:
        folder: That holds them.
        open: A model with the weights of a folder.
        run: What such a model gives.
        want: What base and adapter gave when they were trained.
        options: For `weft.merge`.
        says: What a refusal says.
        compared: Whether PEFT can be asked here.
    """

    folder: Path
    open: Callable[[Path], nn.Module]
    run: Callable[[nn.Module], Tensor]
    want: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    compared: bool = True

    def weft(self) -> str:
        """Merged, repaired, warned of, refused: the first column."""
        try:
            report = weft.merge(
                self.folder / "base",
                self.folder / "adapter",
                output=self.folder / "merged",
                **self.options,
            )
        except WeftError as error:
            refusal = str(error)
        else:
            refusal = ""
        assert self.says in refusal
        if refusal:
            return "refused"
        if self.want is not None:
            got = self.run(self.open(self.folder / "merged"))
            torch.testing.assert_close(got, self.want, rtol=1e-3, atol=2e-4)
        if report.manifest["repairs"]:
            return "merged, repaired"
        # Layers as small as these, with random values, are changed more than training does.
        warned = [w for w in report.warnings if "more than training does" not in w]
        return "merged, with a warning" if warned else "merged"

    def peft(self) -> str:
        """What PEFT makes of it: the second column."""
        if not self.compared:
            return "not compared"
        model = self.open(self.folder / "base")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loaded = peft.PeftModel.from_pretrained(model, self.folder / "adapter")
            except Exception:  # of whatever kind
                return "cannot load it"
            try:
                merged = loaded.eval().merge_and_unload()
            except Exception:
                return "cannot merge it"
        after = merged.state_dict()
        if all(torch.equal(after[name], value) for name, value in before.items() if name in after):
            return "the base model"
        if (self.folder / "merged").exists() and not set(after) ^ set(before):
            ours = self.open(self.folder / "merged").state_dict()
            pairs = [(value, after[name]) for name, value in ours.items() if name in after]
            if all(a.shape == b.shape for a, b in pairs):
                if all(torch.equal(a, b) for a, b in pairs):
                    return "the same bits"
                if all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs):
                    return "the same to rounding"
        if self.want is not None and self.want.isfinite().all():
            off = (self.run(merged) - self.want).abs().max()
            return "what was trained" if off < 1e-3 else "another model"
        return "another model"


# ------------------------------------------------------------------------------------------ scenes


def toy(config: Any, folder: Path, *, model: Any = methods.Toy, inputs: Any = None) -> Scene:
    """Any method of PEFT on a few layers of every type."""
    inputs = methods.TOKENS if inputs is None else inputs
    torch.manual_seed(0)
    base = model().eval()
    (folder / "base").mkdir()
    save_file(base.state_dict(), folder / "base" / "model.safetensors", {"format": "pt"})
    (folder / "base" / "config.json").write_text('{"model_type": "toy"}')
    trained = peft.get_peft_model(base, config() if callable(config) else config)
    methods.noise(trained)
    trained.save_pretrained(folder / "adapter")
    with torch.no_grad():
        want = trained.eval()(inputs)

    def opened(path: Path) -> nn.Module:
        torch.manual_seed(0)
        made = model().eval()
        made.load_state_dict(helpers.load(path))
        return made  # type: ignore[no-any-return]

    def run(made: nn.Module) -> Tensor:
        with torch.no_grad():
            return made(inputs)  # type: ignore[no-any-return]

    return Scene(folder, opened, run, want)


def lora(folder: Path, *, model: Any = methods.Toy, inputs: Any = None, **options: Any) -> Scene:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["linear", "square", "head"], **options}
    return toy(partial(peft.LoraConfig, **settings), folder, model=model, inputs=inputs)


def llama(
    folder: Path, *, model: str = "llama", rows: int | None = None, tie: bool = True, **options: Any
) -> Scene:
    """LoRA on a language model of transformers."""
    base = helpers.save_base(model, "float32", folder / "base")
    config = {"target_modules": ["q_proj", "v_proj"], **options}
    trained = helpers.train(base, AUTO, config, rows=rows, tie=tie)
    trained.save_pretrained(folder / "adapter")
    return Scene(folder, _open, helpers.logits, helpers.logits(trained))


def _open(path: Path) -> nn.Module:
    return helpers.open_model(path, AUTO)  # type: ignore[no-any-return]


def attention(folder: Path) -> Scene:
    """Truth is LoRA's formula: PEFT trains with something else."""
    test_lora_layers.attention(folder)
    (folder / "base" / "config.json").write_text('{"model_type": "toy"}')

    def opened(path: Path) -> nn.Module:
        made = test_lora_layers.Attention().eval()
        made.load_state_dict(helpers.load(path))
        return made

    def run(made: nn.Module) -> Tensor:
        with torch.no_grad():
            return made(test_lora_layers.WORDS)  # type: ignore[no-any-return]

    want = test_lora_layers.reference(folder, test_lora_layers.WORDS).float()
    return Scene(folder, opened, run, want)


def experts(folder: Path) -> Scene:
    base = test_experts.save_base("mixtral", "fused", "float32", folder / "base")
    trained = test_experts.train(base, target_parameters=test_experts.BOTH)
    trained.save_pretrained(folder / "adapter")
    return Scene(folder, test_experts.open_base, helpers.logits, helpers.logits(trained))


def moved(folder: Path, *, init: str, given: str | None = "initial") -> Scene:
    """An initialisation that took its factors off the base."""
    _, trained = test_moved_base.train(folder, init)
    (folder / "base" / "config.json").write_text('{"model_type": "toy"}')
    options = {} if given is None else {"init_adapter": folder / given}
    return Scene(folder, filled, on_tokens, on_tokens(trained), options)


def filled(path: Path) -> nn.Module:
    made = methods.Toy().eval()
    made.load_state_dict(helpers.load(path))
    return made


def on_tokens(made: nn.Module) -> Tensor:
    with torch.no_grad():
        return made(methods.TOKENS)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------ damage


def edited(folder: Path, make: Callable[..., Scene], **config: Any) -> Scene:
    """The config says something else than in training."""
    scene = make(folder)
    test_moved_base.edit(folder / "adapter", **config)
    return scene


def changed(
    folder: Path,
    change: Callable[[dict[str, Tensor]], Any],
    make: Callable[..., Scene] = llama,
    *,
    known: bool = True,
) -> Scene:
    """The file has other tensors than were saved; `known`: what it did can be told all the same."""
    scene = make(folder)
    scene.want = scene.want if known else None
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    new = change(tensors)
    save_file(tensors if new is None else new, file, {"format": "pt"})
    return scene


def disturbed(folder: Path, *, name: str) -> Scene:
    scene = llama(folder)
    rename(folder / "adapter", DISTURBANCES[name])
    return scene


def on_another_base(folder: Path, *, of: Callable[..., Scene] | None = None, **new: Any) -> Scene:
    """Of the same architecture, and twice as wide, or as `new` has it."""
    scene = (of or llama)(folder)
    config = json.loads((folder / "base" / "config.json").read_text())
    new = new or {"hidden_size": 128, "head_dim": None}
    made = helpers.transformers.LlamaConfig(**config | new)
    shutil.rmtree(folder / "base")
    helpers.transformers.LlamaForCausalLM(made).save_pretrained(folder / "base")
    return scene


def first(tensors: dict[str, Tensor], ending: str) -> str:
    return next(key for key in tensors if key.endswith(ending))


def poisoned(tensors: dict[str, Tensor]) -> None:
    tensors[first(tensors, "lora_B.weight")][0, 0] = torch.nan


def silenced(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value * (".lora_A." in key) for key, value in tensors.items()}


def of_one_process(tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if ".lora_B." in key:
            value[value.shape[0] // 4 :] = 0


def trained_in_full(folder: Path) -> Scene:
    return llama(folder, modules_to_save=["lm_head"])


def without(ending: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(ending)}


def two_patterns(folder: Path) -> Scene:
    """Trained in an order that the save does not keep."""
    return llama(folder, alpha_pattern={"self_attn.q_proj": 3, "q_proj": 40})


def other_tool(folder: Path, *, make: Callable[[Path, Path], Path]) -> Scene:
    """Its formulas are held against float64 where that tool's tests are; here it is read at all."""
    base = helpers.save_base("llama", "float32", folder / "base")
    made = make(base, folder / "made")
    target = folder / "adapter"
    shutil.copytree(made if made.is_dir() else made.parent, target)
    return Scene(folder, _open, helpers.logits, None)


def of_kind(folder: Path, *, config: Callable[[], Any], **options: Any) -> Scene:
    """Of a kind that is not merged, as PEFT makes it on a language model."""
    base = helpers.save_base("llama", "float32", folder / "base")
    model = helpers.open_model(base, AUTO)
    trained = peft.get_peft_model(model, config())
    methods.noise(trained)
    trained.save_pretrained(folder / "adapter")
    return Scene(folder, _open, helpers.logits, None)


def of_old_attention(folder: Path) -> Scene:
    """PEFT 0.2's LoRA on parts of a fused matrix."""
    base = helpers.save_base("gpt2", "float32", folder / "base")
    flags = (True, False, True)
    tensors = {}
    for n in range(2):
        module = f"transformer.h.{n}.attn.c_attn"
        shape = helpers.load(base)[f"{module}.weight"].shape
        saved, _, _ = test_merged_lora.train(*shape, flags, 2, n)
        tensors |= {f"{module}.{name}": value for name, value in saved.items()}
    test_merged_lora.write(folder / "adapter", tensors, flags)
    return Scene(folder, _open, helpers.logits, None)
