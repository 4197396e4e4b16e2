"""Checkpoints in float8, as they are written to disks, and what float64 says that they hold."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pairs
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn
CONFIGS: dict[str, dict[str, Any]] = {
    "blocks": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
            }
        },
    },
}


def is_quantised(name: str) -> bool:
    """Linear layers of the decoder, as those that write such models have it."""
    return "_proj.weight" in name


def quantise(
    W: Tensor, form: str, block: tuple[int, int] = (128, 128), scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(numbers, scales) whose largest number in each block is float8's."""
    rows, columns = W.shape
    if form != "blocks":
        block = (rows if form == "tensor" else 1, columns)
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    if scale is None:
        scale = torch.zeros(grid)
        for i in range(grid[0]):
            for j in range(grid[1]):
                scale[i, j] = W[_part(i, block[0]), _part(j, block[1])].abs().max() / LARGEST
    numbers = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = _part(i, block[0]), _part(j, block[1])
            numbers[part] = (W[part].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return numbers, scale


def _part(number: int, size: int) -> slice:
    return slice(number * size, (number + 1) * size)


def worth(numbers: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """Number · scale, element by element, in float64."""
    rows, columns = numbers.shape
    q, s = numbers.float().numpy().astype(np.float64), scale.float().numpy().astype(np.float64)
    if s.size == 1:
        return torch.from_numpy(q * s.reshape(()))
    if s.shape[-1] == 1 and s.shape[0] == rows:
        return torch.from_numpy(q * s)
    places = np.arange(rows)[:, None] // block[0], np.arange(columns)[None, :] // block[1]
    return torch.from_numpy(q * s[places])


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    form: str,
    *,
    config: dict[str, Any] | None = None,
    apart: bool = False,
    drop: str | None = None,
) -> tuple[Path, dict[str, Tensor]]:
    """The folder, and what its tensors are worth.

    Args:
        folder: To create.
        tensors: Of the model before.
        form: `blocks`, `tensor` or `channel`.
        config: Its `quantization_config`; that of the form without.
        apart: Scales lie in a shard of their own.
        drop: A tensor that is lost.
    """
    config = CONFIGS[form] if config is None else config
    size = config.get("weight_block_size") or (128, 128)
    stored, scales, values = {}, {}, {}
    for name, W in tensors.items():
        if not is_quantised(name):
            stored[name], values[name] = W, W.double()
            continue
        stored[name], scale = quantise(W, form, tuple(size))
        values[name] = worth(stored[name], scale, tuple(size))
        ending = "_scale_inv" if form == "blocks" else "_scale"
        scales[name + ending] = scale.reshape(()) if form == "tensor" else scale
        if form == "tensor":
            scales[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
    for part in (stored, scales):
        part.pop(drop or "", None)
    if not apart:
        pairs.write(folder, stored | scales, quantization_config=config)
        return folder, values
    pairs.write(folder, stored, quantization_config=config)
    (folder / "model.safetensors").unlink()
    shards = {
        "model-00001-of-00002.safetensors": scales,
        "model-00002-of-00002.safetensors": stored,
    }
    for file, held in shards.items():
        save_file(held, folder / file, {"format": "pt"})
    places = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, values
