"""`weft doctor --fix` of other tools' adapters: PEFT loads what it writes, and merges the same."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import helpers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from tests.oracle import foreign, test_kohya, test_mlx, test_torchtune

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from tests.oracle.conftest import Lab

AUTO = "AutoModelForCausalLM"


def mlx(base: Path, folder: Path, **kwargs: Any) -> Path:
    tensors, _ = test_mlx.adapt(base, **{"dora": False, "embedding": False} | kwargs)
    return test_mlx.write(folder, tensors, "dora" if kwargs.get("dora") else "lora")


def conv1d(base: Path, folder: Path) -> Path:
    """GPT-2's matrices, which are (in, out) on disk."""
    tensors: dict[str, Tensor] = {}
    for seed, (name, W) in enumerate(helpers.load(base).items()):
        if W.dim() == 2 and ".h." in name:
            tensors |= test_mlx.linear(name.removesuffix(".weight"), W.T, seed)[0]
    return test_mlx.write(folder, tensors, "lora")


def torchtune(base: Path, folder: Path, *, dora: bool = False) -> Path:
    return test_torchtune.write(folder, test_torchtune.adapt(base, dora=dora)[0])


def kohya(base: Path, folder: Path, *, method: Any = test_kohya.lora) -> Path:
    """An alpha per module, all of them different."""
    modules, _ = test_kohya.adapt(base, method)
    folder.mkdir()
    file = test_kohya.write(folder / "a.safetensors", modules, "lycoris_", torch.tensor(0.0))
    tensors = load_file(file)
    alphas = [key for key in tensors if key.endswith(".alpha")]
    save_file(tensors | {k: torch.tensor(1.3 + n / 7) for n, k in enumerate(alphas)}, file)
    return file


def lokr(*, full: bool = False, sides: tuple[int, int] = (4, 4)) -> Callable[..., Any]:
    def method(W: Tensor, seed: int) -> test_kohya.Module:
        (a, b), (rows, columns) = sides, W.shape
        c, d = rows // a, columns // b
        parts = {"lokr_w1": foreign.normal(a, b, seed=seed, scale=0.4)}
        if full:
            parts["lokr_w2"] = foreign.normal(c, d, seed=seed + 1)
        else:
            parts["lokr_w2_a"] = foreign.normal(c, 3, seed=seed + 1)
            parts["lokr_w2_b"] = foreign.normal(3, d, seed=seed + 2)
        return parts, helpers.Exact(W.double(), W.double())

    return method


def fix(base: Path, adapter: Path, root: Path) -> Path:
    """Written, sound, and of the same merge by Weft."""
    weft.doctor(adapter, base, fix=root / "fixed")
    found = weft.doctor(root / "fixed", base)
    assert (found.verdict, found.findings) == ("sound", ())
    for out, source in (("one", adapter), ("two", root / "fixed")):
        helpers.weft_merge(base, source, root / out)
    one, two = (helpers.load(root / out) for out in ("one", "two"))
    before = helpers.load(base)
    assert one.keys() == two.keys() == before.keys()
    assert any(not helpers.same_bytes(one[name], before[name]) for name in one)
    assert all(helpers.same_bytes(one[name], two[name]) for name in one)
    return root / "fixed"


def by_peft(base: Path, fixed: Path) -> dict[str, Tensor]:
    """PEFT's merge of what was written; a warning fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = peft.PeftModel.from_pretrained(helpers.open_model(base, AUTO), fixed)
        return dict(model.merge_and_unload().state_dict())


CASES: dict[str, tuple[str, Callable[..., Path], dict[str, Any]]] = {
    "mlx": ("llama", mlx, {}),
    "mlx with its embedding": ("llama", mlx, {"embedding": True}),
    "mlx on conv1d": ("gpt2", conv1d, {}),
    "torchtune": ("llama", torchtune, {}),
    "torchtune of qwen2": ("qwen2", torchtune, {}),
    "kohya": ("llama", kohya, {}),
    "lokr": ("llama", kohya, {"method": lokr()}),
    "lokr of two full factors": ("llama", kohya, {"method": lokr(full=True)}),
    "lokr of uneven cuts": ("llama", kohya, {"method": lokr(sides=(8, 8))}),
}
NORMED: dict[str, tuple[str, Callable[..., Path], dict[str, Any]]] = {
    "mlx dora": ("llama", mlx, {"dora": True}),
    "torchtune dora": ("llama", torchtune, {"dora": True}),
    "torchtune dora of qwen2": ("qwen2", torchtune, {"dora": True}),
    "kohya dora": ("llama", kohya, {"method": test_kohya.dora}),
    "loha": ("llama", kohya, {"method": test_kohya.loha}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(lab: Lab, tmp_path: Path, name: str) -> None:
    model, make, kwargs = CASES[name]
    base = foreign.base_of(lab, model, "float32")
    merged = by_peft(base, fix(base, make(base, tmp_path / "adapter", **kwargs), tmp_path))
    for tensor, value in helpers.load(tmp_path / "one").items():
        assert helpers.same_bytes(merged[tensor], value), tensor


@pytest.mark.parametrize("name", NORMED)
def test_the_same_to_rounding(lab: Lab, tmp_path: Path, name: str) -> None:
    """Where Weft's merge of a PEFT adapter differs from PEFT's by rounding, these do."""
    model, make, kwargs = NORMED[name]
    base = foreign.base_of(lab, model, "float32")
    merged = by_peft(base, fix(base, make(base, tmp_path / "adapter", **kwargs), tmp_path))
    for tensor, value in helpers.load(tmp_path / "one").items():
        torch.testing.assert_close(merged[tensor], value, rtol=0, atol=3e-6)


def test_of_a_bare_model(lab: Lab, tmp_path: Path) -> None:
    """The files lack the prefix that the modules have, and the adapter's names have it."""
    base = foreign.base_of(lab, "llama", "float32")
    bare = lab.make("bare-llama", lambda folder: _bare(base, folder))
    fixed = fix(bare, torchtune(base, tmp_path / "adapter"), tmp_path)
    assert all(".model.layers." in k or "lm_head" in k for k in helpers.load(fixed))
    by_peft(base, fixed)


def _bare(base: Path, folder: Path) -> None:
    folder.mkdir()
    tensors = {k.removeprefix("model."): v for k, v in helpers.load(base).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((base / "config.json").read_text())


def test_one_layer_is_named_by_its_path(lab: Lab, tmp_path: Path) -> None:
    base = foreign.base_of(lab, "llama", "float32")
    tensors, _ = test_mlx.adapt(base, dora=False, embedding=False)
    last = {key: value for key, value in tensors.items() if ".layers.1." in key}
    fixed = fix(base, test_mlx.write(tmp_path / "adapter", last, "lora"), tmp_path)
    targets = json.loads((fixed / "adapter_config.json").read_text())["target_modules"]
    assert all(target.startswith("model.layers.1.") for target in targets)
    by_peft(base, fixed)


def refused(base: Path, adapter: Path, root: Path) -> str:
    helpers.weft_merge(base, adapter, root / "merged")  # which it can be
    with pytest.raises(weft.WeftError) as caught:
        weft.doctor(adapter, base, fix=root / "fixed")
    assert not (root / "fixed").exists()
    return str(caught.value)


def test_what_peft_has_no_form_for(lab: Lab, tmp_path: Path) -> None:
    """Refused by name, and nothing is written."""
    base, tied = (foreign.base_of(lab, model, "float32") for model in ("llama", "llama-tied"))
    tensors = helpers.load(base)
    name = "model.layers.1.mlp.up_proj.weight"
    full = test_mlx.write(tmp_path / "full", {name: tensors[name] + 1}, "full")
    rows = mlx(base, tmp_path / "rows", dora=True, embedding=True)
    ends = mlx(tied, tmp_path / "ends", embedding=True)
    columns = kohya(base, tmp_path / "columns", method=test_kohya.dora_of_inputs)
    uneven = kohya(base, tmp_path / "uneven", method=lokr(sides=(2, 16)))
    mixed = kohya(base, tmp_path / "mixed")
    some, others = (test_kohya.adapt(base, m)[0] for m in (test_kohya.lora, test_kohya.loha))
    both = {n: (some if ".0." in n else others)[n] for n in some}
    test_kohya.write(mixed, both, "lycoris_", torch.tensor(2.0))
    half = kohya(base, tmp_path / "half")
    normed = test_kohya.adapt(base, test_kohya.dora)[0]
    test_kohya.write(half, {n: (some if ".0." in n else normed)[n] for n in some}, "lora_", None)
    for number, (model, adapter, says) in enumerate(
        [
            (base, full, "is trained in full"),
            (base, rows, "DoRA with norms along the other axis"),
            (base, columns, "DoRA with norms along the other axis"),
            (tied, ends, "is tied to the output"),
            (base, uneven, "cut its Kronecker factors otherwise"),
            (base, mixed, "it is LOHA and LORA"),
            (base, half, "some modules have DoRA's magnitude"),
        ]
    ):
        root = tmp_path / f"out-{number}"
        root.mkdir()
        assert says in refused(model, adapter, root)


def test_without_a_base(lab: Lab, tmp_path: Path) -> None:
    base = foreign.base_of(lab, "llama", "float32")
    for make in (mlx, torchtune, kohya):
        adapter = make(base, tmp_path / make.__name__)
        with pytest.raises(weft.WeftError, match="a base says") as caught:
            weft.doctor(adapter, fix=tmp_path / "fixed")
        assert "--base" in str(caught.value.hint)


@pytest.mark.parametrize("scaling", [20.0, 1.9, 0.1, 1 / 3, 2.0**-5, 1.9999999999999998])
def test_alpha_gives_the_scaling_back(lab: Lab, tmp_path: Path, scaling: float) -> None:
    """Over a rank that is no power of two."""
    base = foreign.base_of(lab, "llama", "float32")
    A, B = foreign.normal(64, 3), foreign.normal(3, 64)
    module = "model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_a": A, f"{module}.lora_b": B}
    adapter = test_mlx.write(
        tmp_path / "adapter", tensors, "lora", lora_parameters={"rank": 3, "scale": scaling}
    )
    fixed = fix(base, adapter, tmp_path)
    config = json.loads((fixed / "adapter_config.json").read_text())
    ours = torch.tensor(config["lora_alpha"] / 3, dtype=torch.float32)
    assert ours == torch.tensor(scaling, dtype=torch.float32)
