"""What no program would take is refused before anything is written; what some take is said so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pairs
import pytest
import torch
from pairs import extract, merged

from weft.core.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INTEGERS = torch.arange(224 * 224).reshape(224, 224).to(torch.int8)


def written(
    root: Path, changed: dict[str, Tensor], base: dict[str, Tensor] | None = None, **config: Any
) -> dict[str, Tensor]:
    """BASE with `base` in it, and TUNED with `changed`, and k_proj moved; -> TUNED."""
    before = pairs.weights() | (base or {})
    moved = {name: 1.01 * W for name, W in before.items() if "k_proj.weight" in name}
    pairs.write(root / "base", before)
    pairs.write(root / "tuned", tuned := before | moved | changed, **config)
    return tuned


def refused(root: Path, **kwargs: Any) -> str:
    with pytest.raises(PlanError) as caught:
        extract(root, rank=4, **kwargs)
    assert not list(root.glob("adapter*"))
    return f"{caught.value} {[problem.hint for problem in caught.value.problems]}"


@pytest.mark.parametrize(
    "name", [Q_BIAS, "model.norm.bias", "model.layers.0.mlp.extra.scale", f"{O_PROJ}_2"]
)
def test_what_is_new_in_a_module_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path, {name: torch.ones(64)})
    said = refused(tmp_path)
    assert f"has no tensor {name}" in said
    assert f"--exclude '{name}'" in said
    adapter, manifest = extract(tmp_path, rank=4, exclude=name)
    assert list(manifest["left_out"]) == [name]
    assert name not in merged(tmp_path, adapter)


def test_new_biases_of_all_layers_are_left_out_by_a_pattern(tmp_path: Path) -> None:
    names = [Q_BIAS.replace("0", str(layer)) for layer in range(2)]
    written(tmp_path, {name: torch.ones(288) for name in names})
    pattern = "model.layers.*.self_attn.q_proj.bias"
    assert f"--exclude '{pattern}' leaves them out" in refused(tmp_path)
    assert sorted(extract(tmp_path, rank=4, exclude=pattern)[1]["left_out"]) == names


def test_a_bias_of_zeros_in_the_base_makes_it_a_change(tmp_path: Path) -> None:
    written(tmp_path, {Q_BIAS: torch.ones(288)}, {Q_BIAS: torch.zeros(288)})
    adapter, _ = extract(tmp_path, rank=4)
    assert torch.equal(merged(tmp_path, adapter)[Q_BIAS], torch.ones(288))


def test_a_new_module_is_no_matter_of_peft(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.extra.weight"
    written(tmp_path, {name: torch.ones(64, 64)})
    adapter, manifest = extract(tmp_path, rank=4)
    assert manifest["serving"].startswith(f"weft merge; in PEFT without tensor {name}")
    assert torch.equal(merged(tmp_path, adapter)[name], torch.ones(64, 64))


@pytest.mark.parametrize(
    ("changed", "base", "side"),
    [
        ({O_PROJ: INTEGERS}, {}, "tuned"),
        ({O_PROJ: torch.ones(224, 224)}, {O_PROJ: INTEGERS}, "base"),
        ({O_PROJ: INTEGERS + 1}, {O_PROJ: INTEGERS}, "tuned"),
        ({"model.extra.weight": INTEGERS}, {}, "tuned"),
    ],
)
def test_integers_are_no_weights(
    tmp_path: Path, changed: dict[str, Tensor], base: dict[str, Tensor], side: str
) -> None:
    written(tmp_path, changed, base)
    said = refused(tmp_path)
    assert f"{side} has integers (int8) in tensor {next(iter(changed))}" in said


def test_integers_that_are_equal_and_counters_are_fine(tmp_path: Path) -> None:
    counter = "model.norm.num_batches_tracked"
    written(tmp_path, {counter: torch.tensor(7)}, {O_PROJ: INTEGERS, counter: torch.tensor(3)})
    adapter, manifest = extract(tmp_path, rank=4)
    assert list(manifest["saved"]) == [counter]
    assert int(merged(tmp_path, adapter)[counter]) == 7


# --------------------------------------------------------------------- tables of another vocabulary


def resized(root: Path, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tables = {name: torch.randn(rows, 64, generator=generator) for name in (EMBEDDING, HEAD)}
    return written(root, tables, vocab_size=rows)


@pytest.mark.parametrize("rows", [pairs.VOCABULARY - 8, pairs.VOCABULARY + 4])
def test_peft_has_to_resize_first(tmp_path: Path, rows: int) -> None:
    tuned = resized(tmp_path, rows)
    adapter, manifest = extract(tmp_path, rank=4)
    assert manifest["serving"].startswith(f"PEFT after model.resize_token_embeddings({rows}); ")
    after = merged(tmp_path, adapter)
    assert all(torch.equal(after[name], tuned[name]) for name in (EMBEDDING, HEAD))


@pytest.mark.parametrize("filters", [{"embed": "skip"}, {"exclude": "embed, lm_head"}])
def test_both_tables_are_left_out(tmp_path: Path, filters: dict[str, str]) -> None:
    resized(tmp_path, pairs.VOCABULARY + 4)
    adapter, manifest = extract(tmp_path, rank=4, **filters)
    assert {EMBEDDING, HEAD} == set(manifest["left_out"])
    assert "resize" not in manifest["serving"]
    assert len(merged(tmp_path, adapter)[HEAD]) == pairs.VOCABULARY


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({"exclude": "embed"}, EMBEDDING),
        ({"exclude": "lm_head"}, HEAD),
        ({"target": "k_proj, lm_head"}, EMBEDDING),
    ],
)
def test_one_table_alone_is_refused(tmp_path: Path, filters: dict[str, str], left: str) -> None:
    resized(tmp_path, pairs.VOCABULARY + 4)
    said = refused(tmp_path, **filters)
    assert f"{left} is to stay as it is" in said
    assert "--embed skip" in said
