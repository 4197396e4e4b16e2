"""`weft diff` against float64 algebra on the files, and models that are no twins."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import weft
from weft.core.errors import FormatError, NotFound, WeftError
from weft.core.filters import names_filter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from tests.conftest import Folders
    from weft.core.differences import TensorDifference

LAYERS = [f"model.layers.{n}.{m}.weight" for n in range(3) for m in ("self_attn.q", "mlp.up")]


def model(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Three layers, a norm and an embedding that is larger than a block is."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict.fromkeys(LAYERS, (48, 33)) | {"model.norm.weight": (48,)}
    shapes["model.embed_tokens.weight"] = (1100, 1024)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def save(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, **config: Any) -> Path:
    folder.mkdir()
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    else:
        files = {name: f"part-{n % shards}.safetensors" for n, name in enumerate(names)}
        for file in set(files.values()):
            part = {name: tensors[name] for name in names if files[name] == file}
            save_file(part, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1100}
    content |= {"num_hidden_layers": 3, "tie_word_embeddings": True} | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def by_name(found: weft.Diff) -> dict[str, TensorDifference]:
    return {each.name: each for each in found.tensors}


def check(found: TensorDifference, a: Tensor, b: Tensor) -> None:
    """Against numpy in float64."""
    A, B = (x.double().numpy() for x in (a, b))
    assert found.changed == int((A != B).sum())
    assert found.share == pytest.approx(np.mean(A != B))
    if not found.changed:
        assert (found.difference, found.base, found.relative) == (0.0, None, None)
        return
    assert found.difference == pytest.approx(np.linalg.norm(A - B), rel=1e-6)
    assert found.base == pytest.approx(np.linalg.norm(B), rel=1e-6)
    assert found.relative == pytest.approx(np.linalg.norm(A - B) / np.linalg.norm(B), rel=1e-6)
    assert found.largest == pytest.approx(np.abs(A - B).max(), rel=1e-6)


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of tensors that change all over, in one element of the last block, and not at all."""
    a, b = model(dtype), model(dtype)
    for name in LAYERS[:3]:
        a[name] = (b[name].double() * 1.01 + 1e-3).to(dtype)
    a["model.embed_tokens.weight"][-1, -1] += 1
    found = weft.diff(save(tmp_path / "a", a, shards=3), save(tmp_path / "b", b))
    assert set(by_name(found)) == set(a)
    for name, each in by_name(found).items():
        check(each, a[name], b[name])
    totals, changed = found.totals, [*LAYERS[:3], "model.embed_tokens.weight"]
    assert (totals.tensors, totals.different) == (len(a), 4)
    A, B = (np.concatenate([x[n].double().numpy().ravel() for n in changed]) for x in (a, b))
    assert totals.relative == pytest.approx(np.linalg.norm(A - B) / np.linalg.norm(B), rel=1e-6)
    assert totals.elements == sum(x.numel() for x in a.values())
    types = {each.name: each for each in found.types}
    assert (types["self_attn.q.weight"].different, types["self_attn.q.weight"].tensors) == (2, 3)
    layers = found.layers["model.layers"]
    assert [(each.name, each.different) for each in layers] == [("0", 2), ("1", 1), ("2", 0)]


@pytest.mark.parametrize("other", [torch.float32, torch.float64], ids=str)
def test_another_dtype_with_equal_values(other: torch.dtype, tmp_path: Path) -> None:
    b = model()
    a = {name: value.to(other) for name, value in b.items()}
    found = weft.diff(save(tmp_path / "a", a), save(tmp_path / "b", b))
    assert found.equal
    assert all(each.dtypes[0] != each.dtypes[1] for each in found.tensors)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_nothing_but_rounding(wide: torch.dtype, narrow: torch.dtype, tmp_path: Path) -> None:
    a = model(wide)
    b = {name: value.to(narrow) for name, value in a.items()}
    a["model.norm.weight"][3] *= 1.5
    found = by_name(weft.diff(save(tmp_path / "a", a), save(tmp_path / "b", b)))
    for name, each in found.items():
        check(each, a[name], b[name])
        assert each.rounds == (name != "model.norm.weight")


def test_what_is_not_finite(tmp_path: Path) -> None:
    """NaN in both is no change; elsewhere it counts, and stays out of the norms."""
    a, b = model(), model()
    name = LAYERS[0]
    a[name][0, :3] = torch.tensor([math.nan, math.inf, 2.0])
    b[name][0, :3] = torch.tensor([math.nan, 1.0, 1.0])
    a[name][1, 0], b[name][1, 0] = math.inf, math.inf
    found = by_name(weft.diff(save(tmp_path / "a", a), save(tmp_path / "b", b)))[name]
    assert (found.changed, found.difference, found.largest) == (2, 1.0, 1.0)
    assert found.not_finite == (3, 2)
    finite = b[name].double()[b[name].isfinite()]
    assert found.base == pytest.approx(float(finite.norm()), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32(scale: float, tmp_path: Path) -> None:
    a, b = ({"w.weight": scale * torch.randn(64, 64)} for _ in range(2))
    found = weft.diff(save(tmp_path / "a", a), save(tmp_path / "b", b), ranks=True)
    check(found.tensors[0], a["w.weight"], b["w.weight"])
    D = (a["w.weight"].double() - b["w.weight"].double()) / scale
    stable = float(D.norm() ** 2 / torch.linalg.matrix_norm(D, 2) ** 2)
    assert found.tensors[0].rank == pytest.approx(stable, rel=0.02)


def test_integers(tmp_path: Path) -> None:
    a = {"w": torch.tensor([2**62, 5, 7]), "m": torch.tensor([True, False])}
    b = {"w": torch.tensor([2**62 + 1, 5, 3]), "m": torch.tensor([True, True])}
    found = by_name(weft.diff(save(tmp_path / "a", a), save(tmp_path / "b", b)))
    assert (found["w"].changed, found["w"].largest) == (2, 4.0)
    assert (found["m"].changed, found["m"].largest) == (1, 1.0)


def test_complex_and_float8(tmp_path: Path) -> None:
    a = {"c": torch.tensor([1 + 2j, 3 + 4j]), "e": torch.randn(4, 8).to(torch.float8_e4m3fn)}
    b = {"c": torch.tensor([1 + 2j, 6 + 8j]), "e": torch.randn(4, 8).to(torch.float8_e4m3fn)}
    found = by_name(weft.diff(save(tmp_path / "a", a), save(tmp_path / "b", b)))
    assert (found["c"].changed, found["c"].difference) == (1, 5.0)
    check(found["e"], a["e"], b["e"])


def test_stable_ranks(tmp_path: Path) -> None:
    """Against the exact singular values: sharp spectra to the digit, flat ones nearly."""
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(96, 96)).Q
    spectra = {
        "one": torch.tensor([3.0] + [0.0] * 79),
        "four": torch.tensor([2.0] * 4 + [0.0] * 76),
        "decaying": torch.arange(1, 81).float() ** -1,
    }
    b = {f"{name}.weight": torch.randn(96, 80) for name in [*spectra, "noise", "wide"]}
    a = {n: x.clone() for n, x in b.items()}
    for name, values in spectra.items():
        a[f"{name}.weight"] += U[:, :80] * values @ torch.linalg.qr(torch.randn(80, 80)).Q
    a["noise.weight"] += torch.randn(96, 80)
    a["wide.weight"], b["wide.weight"] = torch.randn(30, 500), torch.randn(30, 500)
    a["v"], b["v"] = torch.ones(3), torch.zeros(3)
    found = by_name(weft.diff(save(tmp_path / "a", a), save(tmp_path / "b", b), ranks=True))
    assert found["v"].rank is None
    for name in a.keys() - {"v"}:
        D = a[name].double() - b[name].double()
        want = float(D.norm() ** 2 / torch.linalg.matrix_norm(D, 2) ** 2)
        flat = name in ("noise.weight", "wide.weight")
        assert found[name].rank == pytest.approx(want, rel=0.05 if flat else 1e-3), name


# ------------------------------------------------------------------------------- unlike each other


def test_names_and_shapes_that_only_one_has(tmp_path: Path) -> None:
    a, b = model(), model()
    del a[LAYERS[0]], b[LAYERS[1]]
    a["model.norm.weight"] = torch.ones(47, dtype=torch.bfloat16)
    found = by_name(weft.diff(save(tmp_path / "a", a), save(tmp_path / "b", b)))
    assert found[LAYERS[0]].shapes == (None, (48, 33))
    assert found[LAYERS[1]].shapes == ((48, 33), None)
    assert found["model.norm.weight"].shapes == ((47,), (48,))
    for name, each in found.items():
        assert each.equal == (name not in (*LAYERS[:2], "model.norm.weight"))


def test_a_head_that_is_tied_in_one(tmp_path: Path) -> None:
    a, b = model(), model()
    b["lm_head.weight"] = b["model.embed_tokens.weight"].clone()
    tied = save(tmp_path / "a", a)
    found = weft.diff(tied, save(tmp_path / "b", b, tie_word_embeddings=False))
    assert found.equal
    assert "lm_head.weight" in by_name(found)
    assert any("is tied to model.embed_tokens.weight" in note for note in found.notes)
    b["lm_head.weight"][5] += 1
    found = weft.diff(tied, save(tmp_path / "c", b, tie_word_embeddings=False))
    assert [each.name for each in found.tensors if not each.equal] == ["lm_head.weight"]
    check(by_name(found)["lm_head.weight"], a["model.embed_tokens.weight"], b["lm_head.weight"])


# --------------------------------------------------------------------------------- with adapters


def test_an_expression_is_what_its_merge_writes(folders: Folders) -> None:
    """And that, in another way, than the sum in float64."""
    base = folders.base(["layers.0.q_proj", "layers.1.q_proj"])
    adapter = folders.adapter(["layers.1.q_proj"])
    merged = folders.root / "merged"
    weft.merge(base, [f"{adapter}:0.7"], output=merged)
    assert weft.diff(merged, f"{base}+{adapter}:0.7").equal
    found = by_name(weft.diff(f"{base}+{adapter}:0.7", base, ranks=True))
    assert found["layers.0.q_proj.weight"].equal
    factors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.layers.1.q_proj"
    A, B = (factors[f"{prefix}.lora_{x}.weight"].double() for x in "AB")
    each = found["layers.1.q_proj.weight"]
    assert each.difference == pytest.approx(float((0.7 * 2 * B @ A).norm()), rel=1e-5)
    assert 1 <= (each.rank or 0) <= 2.001
    opposite = weft.diff(base, f"{base}+{adapter}:0.7")
    assert by_name(opposite)["layers.1.q_proj.weight"].changed == each.changed


def test_a_merge_that_changed_nothing(folders: Folders) -> None:
    base = folders.base()
    zero = {"layers.0.q_proj.lora_B.weight": torch.zeros(8, 2)}
    adapter, merged = folders.adapter(tensors=zero), folders.root / "merged"
    weft.merge(base, adapter, output=merged)
    found = weft.diff(merged, base)
    assert (found.equal, found.merged) == (True, True)
    other = folders.base(name="other")
    assert not weft.diff(merged, other).merged


# ------------------------------------------------------------------------------------ how it works


def test_threads_do_not_change_a_digit(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a", model(seed=1)), save(tmp_path / "b", model(seed=2))
    alone, many = (weft.diff(one, other, threads=n, ranks=True).tensors for n in (1, 5))
    assert alone == many


def test_equal_models_need_no_torch(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a", model()), save(tmp_path / "b", model(seed=1))
    code = (
        f"import sys, weft; weft.diff({str(one)!r}, {str(other)!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


NUMBERS = st.lists(st.floats(width=32), min_size=1, max_size=40)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(NUMBERS, NUMBERS, st.sampled_from(["bfloat16", "float16", "float32"]))
def test_properties(tmp_path_factory: Any, x: list[float], y: list[float], dtype: str) -> None:
    """Nothing differs from itself, and whichever comes first, as many elements differ."""
    root = tmp_path_factory.mktemp("pair")
    count = min(len(x), len(y))
    a, b = (
        save(root / name, {"w": torch.tensor(values[:count]).to(getattr(torch, dtype))})
        for name, values in (("a", x), ("b", y))
    )
    assert weft.diff(a, a, threads=1).equal
    there, back = (weft.diff(*pair, threads=1).tensors[0] for pair in ((a, b), (b, a)))
    assert (there.changed, there.largest) == (back.changed, back.largest)
    assert there.difference == pytest.approx(back.difference, rel=1e-6)
    assert there.not_finite == back.not_finite[::-1]
    A, B = (load_file(folder / "model.safetensors")["w"] for folder in (a, b))
    assert there.changed == int((~((A == B) | (A.isnan() & B.isnan()))).sum())


# ------------------------------------------------------------------------------ what it cannot do


def test_filters() -> None:
    names = ["model.layers.0.mlp.up.weight", "model.layers.10.mlp.up.weight", "model.norm.weight"]
    for text, want in {
        "norm": [2],
        "norm, layers.0.": [0, 2],
        "*.up.weight": [0, 1],
        "mlp*": [],
        r"/layers\.\d{2,3}\./": [1],
        "/0,1|norm/,mlp": [0, 1, 2],
    }.items():
        assert [n for n, name in enumerate(names) if names_filter(text)(name)] == want, text
    for text in ("", " , ", "/(/"):
        with pytest.raises(WeftError):
            names_filter(text)


def test_a_filter(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a", model()), save(tmp_path / "b", model(seed=1))
    found = weft.diff(one, other, filter="layers.1.")
    assert [each.layer for each in found.tensors] == [1, 1]
    with pytest.raises(WeftError, match="matches none of the 8 tensors"):
        weft.diff(one, other, filter="q_proj")


def test_malformed_inputs(folders: Folders) -> None:
    base = folders.base()
    cut = folders.base(name="cut")
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(FormatError, match="cut"):
        weft.diff(base, cut)
    with pytest.raises(NotFound):
        weft.diff(base, folders.root / "nowhere")
    with pytest.raises(WeftError, match="more than one @"):
        weft.diff(base, "a@b@c")
    diverged = {"layers.0.q_proj.lora_B.weight": torch.full((8, 2), math.nan)}
    with pytest.raises(WeftError, match="NaN"):
        weft.diff(base, f"{base}+{folders.adapter(tensors=diverged)}")
