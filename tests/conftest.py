"""Bases and adapters of a few numbers, in folders with whatever else lies in them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

from weft import native

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

PREFIX = "base_model.model."

# How long a test takes is for benchmarks: a machine may be busy.
settings.register_profile("weft", deadline=None)
settings.load_profile("weft")


class Folders:
    """Writes models into the test's own folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def base(
        self,
        modules: Iterable[str] = ("layers.0.q_proj",),
        tensors: Mapping[str, Tensor] | None = None,
        *,
        name: str = "base",
        files: Mapping[str, str] | None = None,
        **config: Any,
    ) -> Path:
        """A base with an 8 × 8 matrix per module, more `tensors`, and `files` of text beside it."""
        folder = self.root / name
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        made = {f"{module}.weight": torch.randn(8, 8) for module in modules}
        save_file({**made, **(tensors or {})}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
        return _with(folder, files)

    def adapter(
        self,
        modules: Iterable[str] = ("layers.0.q_proj",),
        tensors: Mapping[str, Tensor] | None = None,
        *,
        name: str = "adapter",
        files: Mapping[str, str] | None = None,
        **config: Any,
    ) -> Path:
        """LoRA of rank 2 on each module, for a base as above, and more `tensors`."""
        folder = self.root / name
        folder.mkdir(parents=True)
        torch.manual_seed(1)
        made = {}
        for module in modules:
            made[f"{module}.lora_A.weight"] = 0.1 * torch.randn(2, 8)
            made[f"{module}.lora_B.weight"] = 0.1 * torch.randn(8, 2)
        made |= tensors or {}
        save_file(
            {PREFIX + name: tensor for name, tensor in made.items()},
            folder / "adapter_model.safetensors",
            {"format": "pt"},
        )
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
        (folder / "adapter_config.json").write_text(json.dumps(content))
        return _with(folder, files)


def _with(folder: Path, files: Mapping[str, str] | None) -> Path:
    for name, text in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


@pytest.fixture(params=["compiled", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled loops, and torch in their place."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler was there when weft was installed")
    return str(request.param)
