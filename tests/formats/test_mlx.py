"""mlx-lm's adapter folders: what is read, and what is refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import weft
from weft.cli.show import inspection_as_dict, inspection_as_text
from weft.core.errors import FormatError, NotFound, PlanError, Unsupported
from weft.formats.adapters import formats, is_adapter, open_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.conftest import Folders
    from weft.core.specs import Adapter

UP = "model.layers.0.mlp.up_proj"


def factors(module: str = UP, rank: int = 2, inputs: int = 8, outputs: int = 12) -> dict[str, Any]:
    return {
        f"{module}.lora_a": torch.ones(inputs, rank),
        f"{module}.lora_b": torch.ones(rank, outputs),
    }


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    known = {"fine_tune_type": "lora", "num_layers": 2, "model": "mlx-community/Tiny-4bit"}
    numbers = {"rank": 2, "scale": 10.0, "dropout": 0.0}
    content = known | {"lora_parameters": numbers} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def read(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Adapter:
    return open_adapter(write(folder, tensors or factors(), **config), "the/adapter")


def problems(folder: Path, tensors: dict[str, Tensor], **config: Any) -> list[str]:
    with pytest.raises(PlanError) as error:
        read(folder, tensors, **config)
    return [problem.what for problem in error.value.problems]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


def test_what_is_read(folder: Path) -> None:
    adapter = read(folder)
    (entry,) = adapter.entries
    assert (adapter.format, adapter.kind) == ("mlx-lm", "LORA")
    assert adapter.base_model == "mlx-community/Tiny-4bit"
    assert (entry.target, entry.kind, entry.scaling) == (f"{UP}.weight", "lora", 10.0)
    assert dict(entry.tensors)["A"].shape == (8, 2)
    assert adapter.left_out == ()


def test_one_format_claims_it(folder: Path) -> None:
    write(folder, factors())
    assert [form.__name__ for form in formats() if form.detect(folder)] == [
        "weft.formats.adapters.mlx"
    ]


def test_peft_config_is_pefts(folder: Path) -> None:
    """Somebody's notes on the training beside `peft_type` make no MLX adapter."""
    write(folder, factors(), peft_type="LORA")
    assert [form.__name__.rpartition(".")[2] for form in formats() if form.detect(folder)] == [
        "peft"
    ]


def test_inspect(folder: Path) -> None:
    adapter = read(folder)
    text = inspection_as_text(adapter)
    assert "adapter, LORA, rank 2, scaling 10\n" in text
    assert "written by  mlx-lm" in text
    assert "alpha" not in text
    found = inspection_as_dict(adapter)
    assert (found["format"], found["ranks"], found["scalings"]) == ("mlx-lm", [2], [10.0])


def test_files_that_stand_for_it(folder: Path) -> None:
    """The save of an iteration lies beside the last one, and is read when it is named."""
    write(folder, factors())
    early = factors(outputs=6)
    save_file(early, folder / "0000100_adapters.safetensors")
    for name, outputs in (
        ("adapters.safetensors", 12),
        ("adapter_config.json", 12),
        ("0000100_adapters.safetensors", 6),
    ):
        assert is_adapter(folder / name)
        adapter = open_adapter(folder / name, name)
        assert dict(adapter.entries[0].tensors)["B"].shape == (2, outputs)
        assert adapter.left_out == ()


def test_training_that_did_not_end(folder: Path) -> None:
    write(folder, factors())
    (folder / "adapters.safetensors").rename(folder / "0000100_adapters.safetensors")
    with pytest.raises(NotFound, match=r"no adapters\.safetensors") as error:
        open_adapter(folder, "a")
    assert "0000100_adapters.safetensors" in str(error.value.hint)
    (folder / "0000100_adapters.safetensors").unlink()
    with pytest.raises(NotFound) as error:
        open_adapter(folder, "a")
    assert "finish" in str(error.value.hint)


def test_no_tensors(folder: Path) -> None:
    write(folder, {})
    with pytest.raises(FormatError, match="holds no tensors"):
        open_adapter(folder, "a")


def test_everything_that_is_wrong_at_once(folder: Path) -> None:
    tensors = {
        **factors("a"),
        "b.lora_a": torch.ones(8, 2),
        **factors("c", rank=3),
        "d.lora_a": torch.ones(8, 2),
        "d.lora_b": torch.ones(4, 12),
        "e.lora_a": torch.ones(4, 2, 8),
        "e.lora_b": torch.ones(4, 12, 2),
        **factors("f"),
        "f.m": torch.ones(12),
        "g.linear.weight": torch.ones(8, 8),
        "h.lora_a": torch.ones(0, 2),
    }
    found = problems(folder, tensors)
    file = str(folder / "adapters.safetensors")
    expected = {
        "tensor 'h.lora_a'": "is empty, shape [0, 2]",
        "tensor 'g.linear.weight'": "has no ending that weft knows",
        "module 'b'": "has lora_a [8, 2] and lacks lora_b",
        "module 'c'": "has rank 3, and adapter_config.json says rank = 2",
        "module 'd'": "lora_b [4, 12] are not two matrices that share a rank",
        "module 'e'": "LoRA on a stack of experts or heads",
        "module 'f'": "has a magnitude m",
    }
    for start, what in expected.items():
        (line,) = [line for line in found if line.startswith(start)]
        assert what in line
        assert file in line
    assert len(found) == len(expected)


def test_dora(folder: Path) -> None:
    (line,) = problems(folder, factors(), fine_tune_type="dora")
    assert line.endswith("has lora_a [8, 2], lora_b [2, 12] and lacks m")
    (line,) = problems(folder, factors() | {f"{UP}.m": torch.ones(5)}, fine_tune_type="dora")
    assert "m has neither the columns of lora_b nor the rows of lora_a" in line
    adapter = read(folder, factors() | {f"{UP}.m": torch.ones(12)}, fine_tune_type="dora")
    assert adapter.kind == "DORA"


def test_use_dora_of_older_releases(folder: Path) -> None:
    config = {"lora_layers": 2, "lora_parameters": {"rank": 2, "scale": 10.0}, "use_dora": True}
    write(folder, factors() | {f"{UP}.m": torch.ones(12)})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert open_adapter(folder, "a").kind == "DORA"


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"rank": 2}, "scale = None"),
        ({"rank": 2, "alpha": 16}, "scale = None"),
        ({"scale": 10.0}, "rank = None"),
        ({"scale": "10", "rank": 2}, "scale = '10'"),
        ({"scale": 10.0, "rank": 0}, "rank = 0"),
        ({"scale": True, "rank": 2}, "scale = True"),
        (None, "scale = None"),
        ([], "scale = None"),
    ],
)
def test_numbers_that_are_missing(folder: Path, numbers: Any, says: str) -> None:
    (line,) = problems(folder, factors(), lora_parameters=numbers)
    assert f"lora_parameters has {says}, and it must be a number" in line


def test_two_readings_of_alpha(folder: Path) -> None:
    """`use_dora` came with 0.13, alpha went out of use with 0.14.2, `num_layers` came with 0.19."""
    write(folder, factors())
    numbers = {"rank": 2, "alpha": 16, "scale": 10.0}
    config = {"lora_layers": 2, "use_dora": False, "lora_parameters": numbers}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError) as error:
        open_adapter(folder, "a")
    assert "0.13 to 0.14.1 trained that with 80, and 0.14.2 to 0.18 with 10" in str(error.value)
    assert "take alpha out" in str(error.value.hint)
    del numbers["alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert open_adapter(folder, "a").entries[0].scaling == 10


def test_full_with_factors(folder: Path) -> None:
    tensors = {**factors(), "model.norm.weight": torch.ones(8)}
    found = problems(folder, tensors, fine_tune_type="full", lora_parameters=None)
    assert len(found) == 2
    assert all(
        "is a factor, and adapter_config.json says fine_tune_type = full" in w for w in found
    )


@pytest.mark.parametrize("kind", ["qlora", None, ["lora"], 1])
def test_other_ways_of_training(folder: Path, kind: Any) -> None:
    with pytest.raises(Unsupported, match="fine_tune_type"):
        read(folder, fine_tune_type=kind)


def test_quantised_base(folder: Path, folders: Folders) -> None:
    """What an adapter of mlx-lm was mostly trained on: 4-bit integers in uint32."""
    tensors = {
        f"{UP}.weight": torch.ones(12, 1, dtype=torch.uint32),
        f"{UP}.scales": torch.ones(12, 1),
        f"{UP}.biases": torch.ones(12, 1),
    }
    base = folders.base([], tensors, quantization={"group_size": 8, "bits": 4})
    write(folder, factors())
    with pytest.raises(PlanError) as error:
        weft.plan_merge(base, folder)
    assert "uint32, and ΔW cannot be added to that" in str(error.value)
    assert "merge into the 16-bit model" in str(error.value.hint)


@pytest.mark.parametrize("model", ["qwen3_next", "qwen3_5_moe", "step3p5"])
def test_whole_norms_that_mlx_shifts(folder: Path, folders: Folders, model: str) -> None:
    norm = {"model.norm.weight": torch.ones(8)}
    write(folder, norm, fine_tune_type="full", lora_parameters=None)
    assert weft.plan_merge(folders.base([], norm), folder)
    with pytest.raises(PlanError, match=f"is a whole norm of {model}"):
        weft.plan_merge(folders.base([], norm, name="other", model_type=model), folder)


def test_doctor(folder: Path, folders: Folders) -> None:
    write(folder, factors())
    base = folders.base([], {f"{UP}.weight": torch.ones(12, 8)})
    found = weft.doctor(folder / "adapters.safetensors", base)
    assert found.adapter is not None
    assert found.plan is not None
    with pytest.raises(weft.WeftError, match="an adapter of mlx-lm, and what its modules are"):
        weft.doctor(folder, fix=folders.root / "fixed")
