"""Writes adapters with the release of PEFT that runs this. `make.py` calls it, in each environment.

What is recorded beside an adapter: what the trained model computes, unmerged, in float64; what the
model computes that this release loads from what it saved, and the one that it merges, where these
are something else; and the digests of the tensors that its merge changes, in float32 and bfloat16.

    python write.py 0.21.2 [kind …]     # in a folder with `bases`; writes into `0.21.2`
"""

from __future__ import annotations

import copy
import json
import platform
import shutil
import sys
import traceback
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from kinds import KINDS, Kind
from models import MODELS, arithmetic, digest
from safetensors.torch import save_file

if TYPE_CHECKING:
    from torch import Tensor


def fill(model: torch.nn.Module) -> None:
    """Every trainable value moves: a training run in no time.

    The values are multiples of 1/64, so that short sums of products are exact in float32, and the
    digests of merged tensors do not depend on the order in which a machine adds.
    """
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = torch.randn(value.shape, generator=generator)
                value.copy_((64 * (value + 0.25 * noise)).round() / 64)


def load_base(kind: Kind, dtype: torch.dtype = torch.float32) -> Any:
    # The path gets into adapter_config.json, and must say nothing of this machine.
    model = MODELS[kind.model].load(f"bases/{kind.model}")
    if kind.before:
        kind.before(model)
    return model.to(dtype).eval()


def train(kind: Kind, folder: Path) -> Any:
    torch.manual_seed(0)
    config = getattr(peft, f"{kind.config}Config")(**copy.deepcopy(kind.options))
    model = (kind.wrap or peft.get_peft_model)(load_base(kind), config)
    if kind.initial:
        save_initial(model, folder / "initial")
    if "enable_lora" not in kind.options:  # 0.2 merges these on eval(), and fails
        model.eval()
    fill(model)
    if kind.after:
        kind.after(model)
    return model


def save_initial(model: Any, folder: Path) -> None:
    """As PEFT's documentation has it: as an ordinary adapter."""
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    save(model, folder)
    config.init_lora_weights = init


def save(model: Any, folder: Path, adapter: str = "") -> None:
    # Releases before 0.3 do not know the argument.
    model.save_pretrained(folder, **({"selected_adapters": [adapter]} if adapter else {}))
    inside = folder / adapter
    if adapter and inside.exists():  # where others than "default" go
        for path in inside.iterdir():
            path.rename(folder / path.name)
        inside.rmdir()
    for path in folder.rglob("*"):
        if path.name == "README.md":
            path.unlink()


def say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace(str(Path.cwd()), "")[:300]


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the largest output."""
    return float((one - other).abs().max() / one.abs().max())


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """By the names of the base, whatever an old release leaves wrapped."""
    state = {
        name: value for name, value in model.state_dict().items() if ".original_module" not in name
    }
    return {name.replace(".modules_to_save.default", ""): value for name, value in state.items()}


def load(kind: Kind, folder: Path, dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    return peft.PeftModel.from_pretrained(load_base(kind, dtype), str(folder)).eval()


def merge(kind: Kind, folder: Path, dtype: torch.dtype) -> tuple[dict[str, str], Any]:
    """Digests of the merged tensors, "" for those that are the base's; and the merged model."""
    before = tensors_of(MODELS[kind.model].load(f"bases/{kind.model}").to(dtype))
    merged = load(kind, folder, dtype).merge_and_unload()
    digests = {name: digest(value) for name, value in tensors_of(merged).items()}
    same = {name for name, value in before.items() if digests.get(name) == digest(value)}
    return {name: "" if name in same else value for name, value in digests.items()}, merged


def merges(kind: Kind, folder: Path) -> tuple[dict[str, Any], Any]:
    """What this release merges of its own file: part of an entry of the index, and the model."""
    try:
        single, model = merge(kind, folder, torch.float32)
    except Exception as error:
        return {"not merged": say(error)}, None
    half = single
    entry: dict[str, Any] = {}
    try:
        half, _ = merge(kind, folder, torch.bfloat16)
    except Exception as error:  # old releases compute with some kinds in float32 alone
        entry["not merged in bfloat16"] = say(error)
    changed = [name for name in sorted(single) if single[name] or half[name]]
    columns = (single,) if half is single else (single, half)
    entry["merged"] = {name: [column[name] for column in columns] for name in changed}
    return entry, model


def precisely(kind: Kind, model: Any) -> tuple[Tensor, str]:
    """What a model computes in float64, or in float32 and the reason for that."""
    compute = MODELS[kind.model].compute
    output = compute(model)
    try:
        exact = compute(model.double())
    except Exception as error:
        return output, say(error)
    return (exact, "") if distance(exact, output) < 1e-4 else (output, "other values in float64")


def record(kind: Kind, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write one adapter; returns its entry in the index, and what the trained model computes."""
    compute = MODELS[kind.model].compute
    model, plain = train(kind, folder), compute(load_base(kind))
    output = compute(model)
    if plain.shape == output.shape and distance(plain, output) < 1e-3:
        raise ValueError("the adapter does next to nothing")
    save(model, folder, kind.adapter)
    merged = merges(kind, folder)
    entry: dict[str, Any] = {"model": kind.model, **merged[0]}
    exact, problem = precisely(kind, model)
    if problem:
        entry["float32"] = problem
    outputs = {kind.name: exact}
    try:
        loaded = load(kind, folder, torch.float32)
    except Exception as error:
        entry["not loaded"] = say(error)
    else:
        trained, output = output, compute(loaded)
        if distance(trained, output) > 1e-5:  # saving or loading lost something
            outputs[f"{kind.name}/loaded"], _ = precisely(kind, loaded)
    if merged[1] and distance(output, compute(merged[1])) > 1e-5:
        outputs[f"{kind.name}/merged"], _ = precisely(kind, merged[1])
    return entry, outputs


def versions() -> dict[str, str]:
    return {
        "peft": peft.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arithmetic": arithmetic(),
    }


def knows(kind: Kind) -> bool:
    since, have = ([int(n) for n in v.split(".")] for v in (kind.since, peft.__version__))
    return since <= have and hasattr(peft, f"{kind.config}Config")


def main(version: str, names: list[str]) -> None:
    """Write the kinds with these names, or all of them and the index."""
    assert peft.__version__ == version, peft.__version__
    root = Path(version)
    kinds: dict[str, Any] = {}
    absent: dict[str, str] = {}
    expected: dict[str, Tensor] = {}
    for kind in [KINDS[name] for name in names or KINDS]:
        if not knows(kind):
            continue
        folder = root / kind.name
        try:
            kinds[kind.name], outputs = record(kind, folder)
            expected |= outputs
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            absent[kind.name] = say(error)
            if names:
                traceback.print_exc()
    if not names:
        save_file(expected, root / "expected.safetensors")
        index = {**versions(), "kinds": kinds, "absent": absent}
        (root / "index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2:])
