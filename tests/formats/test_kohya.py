"""Lone files of Kohya's sd-scripts and LyCORIS: what is read, and what is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import weft
from weft.cli.show import inspection_as_dict, inspection_as_text
from weft.core.errors import NotFound, PlanError
from weft.core.names import unflatten
from weft.formats.adapters import formats, is_adapter, open_adapter
from weft.formats.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.conftest import Folders
    from weft.core.specs import Adapter

UP = "lora_te_layers_0_mlp_up_proj"


def lora(module: str = UP, rank: int = 2, alpha: float | None = 4.0) -> dict[str, Tensor]:
    parts = {
        f"{module}.lora_down.weight": torch.ones(rank, 8),
        f"{module}.lora_up.weight": torch.ones(8, rank),
    }
    return parts | ({} if alpha is None else {f"{module}.alpha": torch.tensor(alpha)})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "files" / "adapter.safetensors"


def write(file: Path, tensors: dict[str, Tensor]) -> Path:
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file)
    return file


def read(file: Path, tensors: dict[str, Tensor]) -> Adapter:
    return open_adapter(write(file, tensors), "the/adapter")


def problems(file: Path, tensors: dict[str, Tensor]) -> list[str]:
    with pytest.raises(PlanError) as error:
        read(file, tensors)
    return [problem.what for problem in error.value.problems]


def test_what_is_read(file: Path) -> None:
    adapter = read(file, {**lora(), **lora("lora_te_layers_1_mlp_up_proj", alpha=None)})
    assert (adapter.format, adapter.kind, adapter.base_model) == ("Kohya", "LORA", None)
    assert [(entry.module, entry.scaling) for entry in adapter.entries] == [
        ("layers_0_mlp_up_proj", 2.0),
        ("layers_1_mlp_up_proj", 1.0),
    ]
    assert adapter.notes == ("1 modules have no alpha: it is taken to be the rank, as Kohya does",)
    assert len(adapter.tensors) == 5


def test_inspect(file: Path) -> None:
    tensors = {key: v for n in range(12) for key, v in lora(f"lycoris_layers_{n}_a").items()}
    adapter = read(file, tensors)
    text = inspection_as_text(adapter)
    assert "adapter, LORA, rank 2, scaling 2\n" in text
    assert "layers_*_a.weight ×12 (lora)" in text
    assert "layers      12 (0 to 11)" in text
    assert "written by  LyCORIS" in text
    assert inspection_as_dict(adapter)["format"] == "LyCORIS"
    found = weft.inspect(file)
    assert getattr(found, "kind", "") == "LORA"


def test_file_or_folder(file: Path) -> None:
    """The only one of a folder stands for it, and is not to be chosen among others."""
    write(file, lora())
    for path in (file, file.parent):
        assert [form.__name__.rpartition(".")[2] for form in formats() if form.detect(path)] == [
            "kohya"
        ]
    (file.parent / "tokenizer.json").write_text("{}")
    assert open_adapter(file, "a").side_files == ()
    write(file.with_name("other.safetensors"), lora())
    assert is_adapter(file)
    assert not is_adapter(file.parent)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.layers.0.up_proj.lora_A.weight",
        "layers.0.up_proj.lora_down.weight",
        "model.layers.0.up_proj.weight",
        "net.a1.weight",
        "blend.alpha",
        "image.diff",
    ],
)
def test_other_files(file: Path, key: str) -> None:
    write(file, {key: torch.ones(2, 2)})
    assert not is_adapter(file)


def test_broken_files_are_nobodys(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"broken")
    assert not is_adapter(file)


@pytest.mark.parametrize("prefix", ["lora_te_", "lycoris_"])
def test_no_base(file: Path, prefix: str) -> None:
    ending = "hada_w1_a" if prefix == "lycoris_" else "lora_down.weight"
    write(file, {f"{prefix}a.{ending}": torch.ones(2, 2)})
    with pytest.raises(NotFound, match="is adapter weights, not a base model"):
        open_checkpoint(file, "a")


def test_everything_that_is_wrong_at_once(file: Path) -> None:
    ones = torch.ones
    tensors = {
        **lora(),
        "lora_te_a.lora_down.weight": ones(2, 8),
        "lora_te_b.lora_down.weight": ones(2, 8),
        "lora_te_b.lora_up.weight": ones(8, 3),
        "lora_te_c.alpha": torch.tensor(1.0),
        **lora("lora_te_d", alpha=float("nan")),
        **lora("lora_te_e"),
        "lora_te_e.alpha": ones(2),
        **lora("lora_te_f"),
        "lora_te_f.dora_scale": ones(3, 1),
        "lora_te_g.hada_w1_a": ones(8, 2),
        "lora_te_g.hada_w1_b": ones(2, 8),
        "lora_te_g.hada_w2_a": ones(8, 2),
        "lora_te_h.lokr_w1": ones(2, 2),
        "lora_te_i.lora_down.weight": ones(0, 8),
        **lora("lora_te_j"),
        "lora_te_j.strange": ones(1),
        **lora("lora_te_k"),
        "lora_te_k.hada_w1_a": ones(8, 2),
    }
    found = problems(file, tensors)
    expected = {
        "module 'lora_te_a'": "has lora_down.weight [2, 8]: lora_up missing",
        "module 'lora_te_b'": "they do not share a rank",
        "module 'lora_te_c'": "has alpha, which is no method that weft knows",
        "tensor 'lora_te_d.alpha'": "has shape [] and is no finite number",
        "tensor 'lora_te_e.alpha'": "has shape [2] and is no finite number",
        "module 'lora_te_f'": "dora_scale [3, 1], which has neither a row per output nor",
        "module 'lora_te_g'": "hada_w2_b missing",
        "module 'lora_te_h'": "a factor is lokr_w2, or the product of lokr_w2_a and lokr_w2_b",
        "tensor 'lora_te_i.lora_down.weight'": "is empty, shape [0, 8]",
        "module 'lora_te_j'": "strange, which is no method that weft knows",
        "module 'lora_te_k'": "which is no method that weft knows",
    }
    for start, what in expected.items():
        (line,) = [line for line in found if line.startswith(start)]
        assert what in line, line
        assert str(file) in line
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        ("lora_mid.weight", "LoCon with a core"),
        ("diff", "full matrices"),
        ("w_norm", "norms"),
        ("oft_blocks", "OFT or BOFT"),
        ("on_input", "IA3"),
        ("a1.weight", "GLoRA"),
        ("lambda_layer", "T-LoRA"),
    ],
)
def test_other_methods_by_name(file: Path, ending: str, name: str) -> None:
    tensors = {f"lora_te_{n}_a.{ending}": torch.ones(2) for n in range(3)}
    with pytest.raises(PlanError, match=f"is {name}") as error:
        read(file, tensors)
    assert len(error.value.problems) == 3
    assert "(and 2 more like it)" in str(error.value)


@pytest.mark.parametrize(
    "shapes",
    [
        {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 3), "w2_b": (3, 8)},
        {"w1_a": (8, 2), "w1_b": (3, 8), "w2_a": (8, 2), "w2_b": (2, 8)},
        {"w1_a": (8,), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8)},
        {"w1_a": (2, 8), "w1_b": (2, 8), "w2_a": (2, 8), "w2_b": (2, 8), "t1": (2, 2, 3, 3)},
    ],
)
def test_factors_of_loha_that_do_not_fit(file: Path, shapes: Any) -> None:
    (line,) = problems(file, {f"{UP}.hada_{r}": torch.ones(s) for r, s in shapes.items()})
    assert "do not share a rank" in line


@pytest.mark.parametrize(
    "shapes",
    [
        {"w1": (2, 2), "w2_a": (4, 2), "w2_b": (3, 4)},
        {"w1_a": (2, 2), "w1_b": (2, 2), "w2_a": (4, 3), "w2_b": (3, 4)},
        {"w1": (2, 2), "w2": (4, 4), "t2": (2, 2, 3, 3)},
        {"w1": (2, 2), "w1_a": (2, 2), "w1_b": (2, 2), "w2": (4, 4)},
        {"w1": (2, 2), "w2_a": (4, 2)},
        {"w1": (2, 2), "w2_a": (4,), "w2_b": (3, 4)},
    ],
)
def test_factors_of_lokr_that_do_not_fit(file: Path, shapes: Any) -> None:
    (line,) = problems(file, {f"{UP}.lokr_{r}": torch.ones(s) for r, s in shapes.items()})
    assert f"module '{UP}'" in line


def test_loha_and_lokr_with_magnitudes(file: Path) -> None:
    parts = {f"hada_{r}": (8, 2) if r.endswith("a") else (2, 8) for r in ("w1_a", "w1_b")}
    parts |= {"hada_w2_a": (8, 2), "hada_w2_b": (2, 8), "dora_scale": (8, 1)}
    (line,) = problems(file, {f"{UP}.{end}": torch.ones(shape) for end, shape in parts.items()})
    assert "is loha with dora_scale" in line


def test_several_models_in_one_file(file: Path) -> None:
    tensors = {**lora("lora_te1_a"), **lora("lora_te1_b"), **lora("lora_unet_a")}
    (line,) = problems(file, tensors)
    assert "several models, by the prefixes of its modules: lora_te1_ (2), lora_unet_ (1)" in line


# -------------------------------------------------------------------------------------------- names


def test_unflatten() -> None:
    modules = ["model.layers.0.q_proj", "model.layers.0.mlp.up", "lm_head", "b.a_c", "b.a.c", "x.y"]
    wanted = {
        "model_layers_0_q_proj": ("model.layers.0.q_proj",),
        "layers_0_q_proj": ("layers.0.q_proj",),
        "0_mlp_up": ("0.mlp.up",),
        "lm_head": ("lm_head",),
        "b_a_c": ("b.a.c", "b.a_c"),
        "a_c": ("a.c", "a_c"),
        "ayers_0_q_proj": (),
        "none_of_them": (),
    }
    assert unflatten(wanted, modules) == wanted


def test_unflatten_behind_one_prefix() -> None:
    modules = ["model.layers.0.q_proj", "lm_head"]
    names = ["my_net_model_layers_0_q_proj", "my_net_lm_head", "lm_head_of_another"]
    assert unflatten(names, modules) == {
        names[0]: ("my_net.model.layers.0.q_proj",),
        names[1]: ("my_net.lm_head",),
        names[2]: (),
    }
    two = ["a_model_layers_0_q_proj", "b_model_layers_0_q_proj"]
    assert unflatten(two, modules) == {two[0]: (), two[1]: ()}


def test_names_with_two_readings(file: Path, folders: Folders) -> None:
    write(file, {**lora("lora_te_b_a_c"), **lora("lora_te_b_d")})
    base = folders.base(["b.a.c", "b.a_c", "b.d"])
    with pytest.raises(PlanError) as error:
        weft.plan_merge(base, file)
    (problem,) = error.value.problems
    assert f"b_a_c of {file} could be b.a.c or b.a_c in {base}" in problem.what


def test_names_that_the_base_has_not(file: Path, folders: Folders) -> None:
    write(file, {**lora("lora_te_layers_0_q_proj"), **lora("lora_te_layers_7_q_proj")})
    with pytest.raises(PlanError) as error:
        weft.plan_merge(folders.base(["layers.0.q_proj"]), file)
    (problem,) = error.value.problems
    assert "changes layers_7_q_proj.weight" in problem.what
    assert "nearest: layers.0.q_proj.weight" in problem.what
