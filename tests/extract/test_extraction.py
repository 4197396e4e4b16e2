"""`weft extract` against float64: the optimum, the error that it states, and what it leaves out."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pairs
import pytest
import torch
import vllm_rules as vllm
from pairs import differences, extract, merged
from safetensors.torch import load_file, save_file

import weft
from weft.cli.show_extract import report_as_text
from weft.core.errors import WeftError
from weft.decompose import krylov, matrices
from weft.execute import extraction

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


# --------------------------------------------------------------------------------- how near it is


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_every_module_is_as_near_as_the_truncated_svd(tmp_path: Path, rank: int) -> None:
    pairs.pair(tmp_path)
    adapter, manifest = extract(tmp_path, rank=rank)
    found = pairs.delta_of(adapter)
    want = {name: dW for name, dW in differences(tmp_path).items() if dW.dim() == 2}
    assert found.keys() == want.keys() == manifest["modules"].keys()
    for name, dW in want.items():
        values = torch.linalg.svdvals(dW)
        optimum = float(values[rank:].square().sum().sqrt())
        error = float((dW - found[name]).norm())
        said = manifest["modules"][name]
        assert error <= 1.002 * optimum + 1e-7 * float(dW.norm()), name
        assert said["relative_error"] * float(dW.norm()) == pytest.approx(error, rel=1e-4)
        assert said["bound"] is None or error <= said["bound"] * optimum * (1 + 1e-5)
        assert said["norm"] == pytest.approx(float(dW.norm()), rel=1e-6)
    assert_split_evenly(load_file(adapter / "adapter_model.safetensors"))


def assert_split_evenly(tensors: dict[str, Tensor]) -> None:
    """Each row of A is as long as the column of B that it is multiplied with: √σ both."""
    for key, A in tensors.items():
        if "lora_A" in key or "embedding_A" in key:
            B = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            rows, columns = A.double().norm(dim=1), B.double().norm(dim=0)
            assert torch.allclose(rows, columns, rtol=1e-4)
            values = torch.linalg.svdvals(B.double() @ A.double())[: len(rows)]
            assert torch.allclose(rows * columns, values, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("alpha", [None, 24])
def test_the_merged_model_is_off_by_what_the_manifest_says(
    tmp_path: Path, dtype: str, alpha: float | None
) -> None:
    pairs.pair(tmp_path)
    adapter, manifest = extract(tmp_path, rank=16, dtype=dtype, alpha=alpha)
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    error = pairs.distance(merged(tmp_path, adapter), tuned)
    whole = math.sqrt(sum(float(dW.square().sum()) for dW in differences(tmp_path).values()))
    norm = math.sqrt(sum(float(W.double().square().sum()) for W in tuned.values()))
    totals = manifest["totals"]
    assert totals["relative_error"] == pytest.approx(error / whole, rel=1e-3)
    assert totals["model_error"] == pytest.approx(error / norm, rel=1e-3)
    assert totals["bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    assert {str(t.dtype) for k, t in load_file(adapter / "adapter_model.safetensors").items()
            if ".lora_" in k} == {f"torch.{dtype}"}  # fmt: skip


def test_factors_in_half_precision_cost_what_is_said_of_each(tmp_path: Path) -> None:
    pairs.pair(tmp_path)
    adapter, manifest = extract(tmp_path, rank=96, dtype="bfloat16")
    found, want = pairs.delta_of(adapter), differences(tmp_path)
    for name, said in manifest["modules"].items():
        error = float((want[name] - found[name]).norm() / want[name].norm())
        assert said["relative_error"] == pytest.approx(error, rel=1e-2)
    # All of k_proj is kept, and so rounding is all that is left of its error.
    full = manifest["modules"]["model.layers.0.self_attn.k_proj.weight"]
    assert full["kept"] > 1 - 1e-9
    assert 1e-3 < full["relative_error"] < 1e-2


def test_a_merged_adapter_comes_back_down_to_the_noise(tmp_path: Path) -> None:
    rank = 6
    made = pairs.low_rank(rank, 2e-3)
    pairs.pair(tmp_path, torch.bfloat16, delta=made, moved=lambda name: name.endswith("weight"))
    adapter, manifest = extract(tmp_path, rank="auto")
    ranks = [module["rank"] for module in manifest["modules"].values()]
    assert len(ranks) == 10
    assert sum(found == rank for found in ranks) >= 0.95 * len(ranks)
    assert all(module["noise"]["fits"] for module in manifest["modules"].values())
    found = pairs.delta_of(adapter)
    for number, (name, W) in enumerate(pairs.weights().items()):
        if name not in found:
            continue
        true = made(tuple(W.shape), torch.Generator().manual_seed(100 + number)).double()
        m, n = W.shape
        deviation = manifest["modules"][name]["noise"]["edge"] / (m**0.5 + n**0.5)
        # Noise has a part in the r left and right directions that are kept, and nowhere else.
        least = deviation * math.sqrt(rank * (m + n))
        assert float((found[name] - true).norm()) < 1.3 * least
        assert manifest["modules"][name]["noise"]["kept_above"] > 0.99


def test_an_expression_gives_the_adapters_delta_exactly(tmp_path: Path) -> None:
    """Not rounded to the base's bfloat16 in between."""
    pairs.pair(tmp_path, torch.bfloat16, delta=pairs.low_rank(3, 1e-6))
    adapter, _ = extract(tmp_path, "first", rank=3)
    again, manifest = extract(
        tmp_path, "second", tuned=f"{tmp_path}/base+{adapter}:0.5", rank="auto"
    )
    one, two = pairs.delta_of(adapter), pairs.delta_of(again)
    assert pairs.distance({n: 0.5 * dW for n, dW in one.items()}, two) < 1e-5 * pairs.distance(
        one, {n: 0 * dW for n, dW in one.items()}
    )
    assert {module["rank"] for module in manifest["modules"].values()} == {3}


def test_a_difference_that_is_read_again_for_every_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs.pair(tmp_path)
    one, held = extract(tmp_path, "held", rank=8)
    monkeypatch.setattr(extraction, "HELD", 0)
    two, streamed = extract(tmp_path, "streamed", rank=8)
    a, b = pairs.delta_of(one), pairs.delta_of(two)
    norm = pairs.distance(a, {name: 0 * dW for name, dW in a.items()})
    # Only what is held begins in bfloat16: each is within 1.002 of the same optimum, no nearer.
    assert pairs.distance(a, b) < 1e-2 * norm
    assert held["totals"]["relative_error"] == pytest.approx(
        streamed["totals"]["relative_error"], rel=krylov.TOLERANCE - 1
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_matrix_with_as_many_rows_as_there_are_tokens(tmp_path: Path, tied: bool) -> None:
    """In a layer it is no embedding, to extract and to merge."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (192, 64),
        "model.layers.0.mlp.gate_proj.weight": (192, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 192),
        "model.layers.1.mlp.gate_proj.weight": (192, 64),
        "model.norm.weight": (64,),
    } | ({} if tied else {"lm_head.weight": (192, 64)})
    base = {n: 0.02 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    tuned = {n: W + 1e-3 * torch.randn(W.shape, generator=generator) for n, W in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        pairs.write(tmp_path / name, tensors, vocab_size=192, tie_word_embeddings=tied)
    adapter, manifest = extract(tmp_path, rank=64)
    gates = [n for n in shapes if "gate" in n]
    assert {manifest["modules"][name]["kind"] for name in gates} == {"linear"}
    back = merged(tmp_path, adapter)
    assert back.keys() == tuned.keys()
    for name, W in tuned.items():
        assert torch.allclose(back[name].float(), W, atol=2e-7), name


def test_what_is_not_proved_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.pair(tmp_path)
    _, proved = extract(tmp_path, "proved", rank=8)
    assert not any("not proved" in warning for warning in proved["warnings"])
    assert all(module["bound"] <= 1.002 for module in proved["modules"].values())
    monkeypatch.setattr(krylov, "_MOST_BLOCKS", 1)
    monkeypatch.setattr(matrices, "multiplies_bfloat16", lambda device: False)
    _, hasty = extract(tmp_path, "hasty", rank=8)
    (said,) = (warning for warning in hasty["warnings"] if "not proved" in warning)
    bounds = {name: module["bound"] for name, module in hasty["modules"].items()}
    assert any(bound is None or bound > 1.002 for bound in bounds.values())
    assert any(name in said for name in bounds)


# ----------------------------------------------------------------------------------- which ranks


def test_energy_takes_the_smallest_rank_that_keeps_it(tmp_path: Path) -> None:
    pairs.pair(tmp_path)
    adapter, manifest = extract(tmp_path, energy=0.8)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]  # so that every scaling is 1
    assert config["alpha_pattern"] == config["rank_pattern"] != {}
    for name, dW in differences(tmp_path).items():
        if dW.dim() == 2:
            squares = torch.linalg.svdvals(dW).square()
            rank = int((squares.cumsum(0) < 0.8 * squares.sum()).sum()) + 1
            assert abs(manifest["modules"][name]["rank"] - rank) <= 1
            assert manifest["modules"][name]["kept"] >= 0.8


@pytest.mark.parametrize("uniform", [False, True])
def test_a_budget_is_kept_and_used(tmp_path: Path, uniform: bool) -> None:
    pairs.pair(tmp_path, moved=lambda name: name.endswith("weight"))
    adapter, manifest = extract(tmp_path, size="150kB", uniform_rank=uniform)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    unit = 4 * sum(sum(shape) for n, shape in pairs.names().items() if len(shape) == 2)
    assert 150_000 - (unit if uniform else 3000) < size <= 150_000
    ranks = {module["rank"] for module in manifest["modules"].values()}
    assert (len(ranks) == 1) == uniform
    if not uniform:  # no unit of rank that was left would have been worth more than one taken
        values = {
            n: torch.linalg.svdvals(d) for n, d in differences(tmp_path).items() if d.dim() > 1
        }
        taken, left = [], []
        for name, module in manifest["modules"].items():
            gains = values[name].square() / sum(pairs.names()[name])
            taken += gains[: module["rank"]].tolist()
            left += gains[module["rank"] : module["rank"] + 1].tolist()
        assert min(taken) > 0.8 * max(left)


@pytest.mark.parametrize(
    "options", [{}, {"embed": "save"}, {"uniform_rank": True}, {"ranks": [("q_proj", 3)]}]
)
def test_a_budget_that_holds_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    pairs.pair(tmp_path)
    with pytest.raises(WeftError, match=r"1\.00 kB are too few") as caught:
        extract(tmp_path, size="1kB", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]
    table = "30,720 of them for lm_head.weight in full"  # 120 · 64 · 4
    assert (table in str(caught.value)) == ("embed" in options)
    least = int(str(caught.value.hint).split()[3].replace(",", ""))
    with pytest.raises(WeftError, match="are too few"):
        extract(tmp_path, size=least - 1, **options)
    adapter, _ = extract(tmp_path, size=least, **options)
    assert (adapter / "adapter_model.safetensors").stat().st_size <= least


def test_ranks_of_single_modules(tmp_path: Path) -> None:
    pairs.pair(tmp_path)
    _, manifest = extract(tmp_path, rank=4, ranks=[("layers.1", 9), ("q_proj", 5)])
    ranks = {name: module["rank"] for name, module in manifest["modules"].items()}
    assert ranks["model.layers.0.self_attn.q_proj.weight"] == 5
    assert ranks["model.layers.1.self_attn.q_proj.weight"] == 9
    assert ranks["model.layers.0.self_attn.o_proj.weight"] == 4


@pytest.mark.parametrize(("rank", "said"), [(9, True), (6, False), (4, False)])
def test_a_rank_that_holds_noise_is_said(tmp_path: Path, rank: int, said: bool) -> None:
    delta = pairs.low_rank(6, 2e-3)
    pairs.pair(tmp_path, torch.bfloat16, delta=delta, moved=lambda name: name.endswith("weight"))
    _, manifest = extract(tmp_path, rank=rank)
    noisy = "6 singular values at most stand above"
    found = [each for each in manifest["warnings"] if noisy in each]
    assert len(found) == said
    assert all("10 tensors" in each and "--rank auto" in each for each in found)


def test_a_module_of_rounding_noise_alone_is_left_out_and_said(tmp_path: Path) -> None:
    """MergeKit writes rank 0, which PEFT cannot load."""

    def delta(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if shape == pairs.SHAPES["o_proj"]:  # a last place here and there
            return 2e-5 * torch.randn(shape, generator=generator)
        return pairs.low_rank(2, 3e-3)(shape, generator)

    pairs.pair(tmp_path, torch.bfloat16, delta=delta)
    adapter, manifest = extract(tmp_path, rank="auto")
    assert {m["rank"] for m in manifest["modules"].values()} == {2}
    assert set(manifest["left_out"]) == {
        f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(2)
    }
    assert any("stands above the noise" in warning for warning in manifest["warnings"])
    assert not any("o_proj" in key for key in load_file(adapter / "adapter_model.safetensors"))


def test_a_model_tuned_in_full_by_less_than_an_ulp(tmp_path: Path) -> None:
    """By the noise of larger updates nothing of it would stand out, and all would be left out."""

    def delta(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        change = pairs.falling(shape, generator)
        return 1.5e-5 * change / change.square().mean().sqrt()  # an ulp of 0.02 is 1.2e-4

    pairs.pair(tmp_path, torch.bfloat16, delta=delta, moved=lambda name: name.endswith("weight"))
    adapter, manifest = extract(tmp_path, rank="auto")
    wide = {name for name, shape in pairs.names().items() if min(shape) >= 192}
    ranks = {name: module["rank"] for name, module in manifest["modules"].items()}
    assert all(4 <= ranks[name] <= 64 for name in wide)
    assert not wide & set(manifest["left_out"])
    assert all(manifest["modules"][name]["noise"]["fits"] for name in wide)
    # Each is nearer to the update that was rounded than the difference that was left of it is.
    found, seen = pairs.delta_of(adapter), differences(tmp_path)
    for number, (name, W) in enumerate(pairs.weights().items()):
        if name in wide:
            true = delta(tuple(W.shape), torch.Generator().manual_seed(100 + number)).double()
            assert float((found[name] - true).norm()) < float((seen[name] - true).norm())


def test_auto_says_where_the_noise_is_not_that_of_rounding(tmp_path: Path) -> None:
    """TUNED was tuned from float32, and BASE is its rounding, too: √2 of the noise of one side."""
    made = pairs.low_rank(3, 2e-3)
    base, tuned = pairs.weights(torch.bfloat16), pairs.weights(torch.bfloat16)
    for number, (name, W) in enumerate(pairs.weights().items()):
        tuned[name] = (W + made(tuple(W.shape), torch.Generator().manual_seed(number))).bfloat16()
    pairs.write(tmp_path / "base", base)
    pairs.write(tmp_path / "tuned", tuned)
    _, manifest = extract(tmp_path, rank="auto")
    (warning,) = (each for each in manifest["warnings"] if "what auto takes for noise" in each)
    assert "is not as large as that of rounding in 10 tensors" in warning
    assert {module["noise"]["fits"] for module in manifest["modules"].values()} == {False}
    assert all(module["rank"] > 3 for module in manifest["modules"].values())
    _, manifest = extract(tmp_path, "three", rank=3)
    assert manifest["warnings"] == []


def test_an_update_that_rounding_does_not_hide_is_said_to_have_large_factors(
    tmp_path: Path,
) -> None:
    pairs.pair(tmp_path)  # in float32
    _, manifest = extract(tmp_path, rank="auto")
    assert any("are larger than the tensor" in said for said in manifest["warnings"])
    _, manifest = extract(tmp_path, "small", rank=8)
    assert not manifest["warnings"]
    _, manifest = extract(tmp_path, "more than there are", rank=10_000)
    assert any("a lower --rank" in said for said in manifest["warnings"])


def test_one_rank_for_all_and_nothing_in_full(tmp_path: Path) -> None:
    pairs.pair(tmp_path)
    adapter, manifest = extract(tmp_path, rank=128, uniform_rank=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["modules_to_save"]) == (128, {}, None)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(".lora_" in key for key in tensors)
    assert all(tensor.shape["A" not in key] == 128 for key, tensor in tensors.items())
    assert manifest["totals"]["left_out"] == 5
    assert any("--uniform-rank" in warning for warning in manifest["warnings"])
    assert manifest["serving"].startswith("PEFT, vLLM")
    assert vllm.refusals(adapter) == []


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 8, "exclude": "norm, bias, embed, lm_head"},
        {"rank": 8, "embed": "lora", "exclude": "norm, bias"},
        {"energy": 0.5, "exclude": "norm, bias, embed, lm_head"},
        {"rank": 8, "exclude": "norm, embed, lm_head"},
        {"rank": 8, "exclude": "norm, bias", "embed": "save"},
        {"rank": "auto", "uniform_rank": True},
    ],
)
def test_vllm_is_named_where_it_takes_the_adapter(tmp_path: Path, options: dict[str, Any]) -> None:
    pairs.pair(tmp_path)
    adapter, manifest = extract(tmp_path, **options)
    assert manifest["serving"].startswith("PEFT, vLLM") == (vllm.refusals(adapter) == [])


def test_another_base_of_the_same_shapes_is_said(tmp_path: Path) -> None:
    pairs.pair(tmp_path)
    other = {
        name: 0.02 * torch.randn(W.shape, generator=torch.Generator().manual_seed(9))
        for name, W in pairs.weights().items()
    }
    pairs.write(tmp_path / "other", other)
    report = weft.extract(
        tmp_path / "tuned", base=tmp_path / "other", output=tmp_path / "odd", rank=4
    )
    (said,) = (each for each in report.warnings if "more than training does" in each)
    assert "check that TUNED was tuned from this BASE" in said
    _, manifest = extract(tmp_path, rank=4)
    assert not any("more than training does" in each for each in manifest["warnings"])


def test_vllm_has_no_rank_above_512(tmp_path: Path) -> None:
    """Of its --max-lora-rank."""
    for name, seed in (("base", 0), ("tuned", 1)):
        generator = torch.Generator().manual_seed(seed)
        weight = 0.02 * torch.randn(640, 640, generator=generator)
        pairs.write(tmp_path / name, {"model.layers.0.self_attn.q_proj.weight": weight})
    for rank, taken in ((512, True), (513, False)):
        adapter, manifest = extract(tmp_path, str(rank), rank=rank)
        assert manifest["serving"].startswith("PEFT, vLLM") == taken
        assert (vllm.refusals(adapter) == []) == taken
    assert "vLLM has no rank above 512" in manifest["serving"]


# ---------------------------------------------------------------------------- what is left as it is


def test_what_did_not_change_is_not_stored(tmp_path: Path) -> None:
    pairs.pair(tmp_path, moved=lambda name: "q_proj" in name)
    adapter, manifest = extract(tmp_path, rank=4)
    keys = load_file(adapter / "adapter_model.safetensors").keys()
    assert {key.split(".")[-3] for key in keys} == {"q_proj"}
    assert manifest["totals"]["unchanged"] == len(pairs.names()) - 2
    assert not manifest["left_out"]


def test_equal_models_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    pairs.pair(tmp_path, moved=lambda name: False)
    with pytest.raises(WeftError, match="no tensor of TUNED differs from BASE"):
        extract(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_nothing_that_changed_is_dropped_without_a_line(tmp_path: Path) -> None:
    pairs.pair(tmp_path)
    _, manifest = extract(
        tmp_path,
        rank=4,
        target="q_proj, o_proj",
        save="/layers\\.0\\.input/",
        exclude="*.1.*o_proj*",
    )
    kept = {*manifest["modules"], *manifest["saved"]}
    assert kept == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.input_layernorm.weight",
    }
    assert kept | set(manifest["left_out"]) == set(pairs.names())
    assert manifest["left_out"]["model.layers.1.self_attn.o_proj.weight"]["why"].startswith(
        "--exclude"
    )
    (line,) = [w for w in manifest["warnings"] if "left as in the base" in w]
    assert "11 changed tensors" in line
    # And what it costs counts.
    lost = sum(float(differences(tmp_path)[name].square().sum()) for name in manifest["left_out"])
    whole = sum(float(dW.square().sum()) for dW in differences(tmp_path).values())
    assert manifest["totals"]["kept"] < 1 - lost / whole


def test_a_table_with_other_rows_has_no_difference_to_lose(tmp_path: Path) -> None:
    pairs.pair(tmp_path, moved=lambda name: "proj.weight" in name)
    file = tmp_path / "tuned/model.safetensors"
    tensors = load_file(file)
    table = torch.cat([tensors["model.embed_tokens.weight"], torch.ones(8, 64)])
    save_file(tensors | {"model.embed_tokens.weight": table}, file, {"format": "pt"})
    report = weft.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "a", rank=4, embed="skip"
    )
    (line,) = [w for w in report.warnings if "left as in the base" in w]
    assert ", 0.0 % of ‖ΔW‖² (not counting tensor model.embed_tokens.weight: no ΔW)" in line
    assert "not counted: 1 tensor left out without a ΔW" in report_as_text(report)


@pytest.mark.parametrize(("embed", "kept"), [("lora", "modules"), ("save", "saved")])
def test_the_embedding_as_asked(tmp_path: Path, embed: str, kept: str) -> None:
    pairs.pair(tmp_path)
    _, manifest = extract(tmp_path, rank=4, embed=embed)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(manifest[kept])
    _, manifest = extract(tmp_path, "without", rank=4, embed="skip")
    assert {"model.embed_tokens.weight", "lm_head.weight"} == set(manifest["left_out"])


def test_the_embedding_is_saved_where_that_is_smaller(tmp_path: Path) -> None:
    pairs.pair(tmp_path)
    _, manifest = extract(tmp_path, rank=64)  # 64 · (120 + 64) numbers against 120 · 64
    assert "model.embed_tokens.weight" in manifest["saved"]
    assert "smaller in full" in manifest["saved"]["model.embed_tokens.weight"]["why"]


@pytest.mark.parametrize("size", [1e-3, 1e-5, 0])
def test_a_tuned_matrix_that_is_nearly_gone(tmp_path: Path, size: float) -> None:
    """W and ΔW cancel: ‖tuned‖² is no sum of their products."""
    base = pairs.weights()
    name = "model.layers.0.self_attn.q_proj.weight"
    generator = torch.Generator().manual_seed(3)
    tuned = base | {name: size * 0.02 * torch.randn(base[name].shape, generator=generator)}
    pairs.write(tmp_path / "base", base)
    pairs.write(tmp_path / "tuned", tuned)
    adapter, manifest = pairs.extract(tmp_path, rank=4)
    assert list(manifest["modules"]) == [name]
    delta = tuned[name].double() - base[name].double()
    error = float((delta - pairs.delta_of(adapter)[name]).norm() / delta.norm())
    assert manifest["modules"][name]["relative_error"] == pytest.approx(error, rel=1e-4)


def test_factors_that_overflow_leave_nothing_behind(tmp_path: Path) -> None:
    """Some in the middle of the file, while others are made ahead; nor torch with fewer threads."""
    pairs.pair(tmp_path)
    before = torch.get_num_threads()
    extract(tmp_path, "sound", rank=8)
    assert torch.get_num_threads() == before
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    name = sorted(key for key in tensors if tensors[key].dim() == 2)[3]
    tensors[name] += 3e9 * torch.randn(
        tensors[name].shape, generator=torch.Generator().manual_seed(1)
    )
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeftError, match=r"overflow float16"):
        weft.extract(
            tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "out", rank=8,
            dtype="float16", threads=2,
        )  # fmt: skip
    assert torch.get_num_threads() == before
    assert not list(tmp_path.glob("out*"))
