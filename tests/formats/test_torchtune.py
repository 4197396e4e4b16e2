"""torchtune's adapters in its own form: what is read, and what is refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import weft
from weft.cli.show import inspection_as_text
from weft.core.errors import FormatError, NotFound, PlanError
from weft.core.specs import Adapter
from weft.formats.adapters import formats, open_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.conftest import Folders

Q = "layers.0.attn.q_proj"
HF_Q = "model.layers.0.self_attn.q_proj"
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}


def factors(module: str = Q, rank: int = 2, inputs: int = 8, outputs: int = 8) -> dict[str, Tensor]:
    return {
        f"{module}.lora_a.weight": torch.ones(rank, inputs),
        f"{module}.lora_b.weight": torch.ones(outputs, rank),
    }


def write(folder: Path, tensors: Any, name: str = "adapter_model.pt", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / name)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def read(folder: Path, tensors: Any = None, **config: Any) -> Adapter:
    return open_adapter(write(folder, tensors or factors(), **config), "the/adapter")


def claims(path: Path) -> list[str]:
    return [form.__name__.rpartition(".")[2] for form in formats() if form.detect(path)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


def test_what_is_read(folder: Path) -> None:
    names = {
        "layers.3.attn.q_proj": "model.layers.3.self_attn.q_proj",
        "layers.3.attn.k_proj": "model.layers.3.self_attn.k_proj",
        "layers.3.attn.v_proj": "model.layers.3.self_attn.v_proj",
        "layers.3.attn.output_proj": "model.layers.3.self_attn.o_proj",
        "layers.3.mlp.w1": "model.layers.3.mlp.gate_proj",
        "layers.3.mlp.w2": "model.layers.3.mlp.down_proj",
        "layers.3.mlp.w3": "model.layers.3.mlp.up_proj",
        "output": "lm_head",
    }
    tensors = {key: value for name in names for key, value in factors(name).items()}
    adapter = read(folder, tensors, base_model_name_or_path="meta-llama/Llama-3.2-1B")
    assert [entry.module for entry in adapter.entries] == list(names.values())
    assert {entry.scaling for entry in adapter.entries} == {2.0}
    rotated = [entry.module[-6:] for entry in adapter.entries if dict(entry.params).get("rotary")]
    assert rotated == ["q_proj", "k_proj"]
    assert adapter.base_model == "meta-llama/Llama-3.2-1B"
    assert "written by  torchtune" in inspection_as_text(adapter)


def test_one_format_claims_it(folder: Path) -> None:
    """Beside it lies torchtune's copy for PEFT, which is read where it is named."""
    write(folder, factors())
    copy = {f"base_model.model.{HF_Q}.lora_A.weight": torch.ones(2, 8)}
    copy[f"base_model.model.{HF_Q}.lora_B.weight"] = torch.ones(8, 2)
    save_file(copy, folder / "adapter_model.safetensors")
    for name in ("", "adapter_model.pt", "adapter_config.json"):
        assert claims(folder / name) == ["torchtune"]
    assert claims(folder / "adapter_model.safetensors") == ["peft"]
    assert open_adapter(folder / "adapter_model.safetensors", "a").format == "PEFT"


def test_several_epochs(folder: Path) -> None:
    """Before 0.5 torchtune wrote all epochs into one folder."""
    for epoch in (0, 2, 10):
        write(folder, factors(outputs=8 + epoch), f"adapter_{epoch}.pt")
    with pytest.raises(NotFound, match=r"3 saves of torchtune: adapter_0\.pt, .*10\.pt") as error:
        open_adapter(folder, "a")
    assert str(error.value.hint).endswith("adapter_10.pt")
    adapter = open_adapter(folder / "adapter_2.pt", "a")
    assert dict(adapter.entries[0].tensors)["B"].shape == (10, 2)


def test_no_config(folder: Path) -> None:
    """As torchtune leaves Phi-3, Llama 3.2 Vision, and checkpoints in Meta's form."""
    write(folder, factors())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(NotFound, match=r"no adapter_config\.json beside it says how") as error:
        open_adapter(folder, "a")
    assert '{"peft_type": "LORA", "r": 8, "lora_alpha": 16}' in str(error.value.hint)


def test_malformed_files(folder: Path) -> None:
    write(folder, {"layers.0": [1, 2]})
    with pytest.raises(FormatError, match="not a tensor"):
        open_adapter(folder, "a")
    (folder / "adapter_model.pt").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="not a sound torch file"):
        open_adapter(folder, "a")
    with pytest.raises(FormatError, match="holds no tensors"):
        open_adapter(write(folder, {}), "a")
    with pytest.raises(FormatError, match="lora_alpha = 'x'"):
        read(folder, lora_alpha="x")
    with pytest.raises(FormatError, match="says peft_type IA3, and torchtune trains LORA"):
        read(folder, peft_type="IA3")


def test_everything_that_is_wrong_at_once(folder: Path) -> None:
    tensors = {
        **factors(),
        "layers.0.attn.k_proj.lora_a.weight": torch.ones(2, 8),
        **factors("layers.0.attn.v_proj", rank=3),
        "layers.1.attn.q_proj.lora_a.weight": torch.ones(2, 8),
        "layers.1.attn.q_proj.lora_b.weight": torch.ones(8, 4),
        **factors("layers.1.attn.v_proj"),
        "layers.1.attn.v_proj.magnitude": torch.ones(5),
        **factors("decoder.layers.0.attn.q_proj"),
        "layers.0.sa_norm.scale": torch.ones(8),
        "layers.2.attn.q_proj.lora_a.weight": torch.ones(0),
    }
    with pytest.raises(PlanError) as error:
        read(folder, tensors)
    expected = {
        "module 'layers.0.attn.k_proj'": "has lora_a.weight [2, 8] and lacks lora_b.weight",
        "module 'model.layers.0.self_attn.v_proj'": "has rank 3, and adapter_config.json says r =",
        "module 'layers.1.attn.q_proj'": "are not two matrices that share a rank",
        "module 'layers.1.attn.v_proj'": "magnitude has not the rows of lora_b",
        "module 'decoder.layers.0.attn.q_proj'": "is none that weft knows of torchtune's models",
        "tensor 'layers.0.sa_norm.scale'": "has no ending that weft knows",
        "tensor 'layers.2.attn.q_proj.lora_a.weight'": "is empty, shape [0]",
    }
    found = [problem.what for problem in error.value.problems]
    for start, what in expected.items():
        (line,) = [line for line in found if line.startswith(start)]
        assert what in line
        assert str(folder / "adapter_model.pt") in line
    assert len(found) == len(expected)


def test_no_lora_alpha(folder: Path) -> None:
    write(folder, factors())
    config = {key: value for key, value in CONFIG.items() if key != "lora_alpha"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="gives no lora_alpha"):
        open_adapter(folder, "a")


# -------------------------------------------------------------------------------- what needs a base


def plan(folder: Path, folders: Folders, **config: Any) -> Any:
    write(folder, factors())
    base = folders.base([HF_Q], **config)
    return weft.plan_merge(base, folder).plan


@pytest.mark.parametrize("model", ["llama", "mistral", "gemma", "gemma2"])
def test_heads_of_the_base(folder: Path, folders: Folders, model: str) -> None:
    (job,) = plan(folder, folders, model_type=model, num_attention_heads=2).jobs
    (delta,) = job.expression.deltas
    assert dict(delta.params) == {"rotary_heads": 2}


def test_key_value_heads(folder: Path, folders: Folders) -> None:
    k = "layers.0.attn.k_proj"
    write(folder, factors(k))
    for name, config, heads in (
        ("grouped", {"num_attention_heads": 4, "num_key_value_heads": 2}, 2),
        ("not", {"num_attention_heads": 4}, 4),
        ("text", {"text_config": {"num_attention_heads": 4, "num_key_value_heads": 1}}, 1),
    ):
        base = folders.base([HF_Q.replace("q_proj", "k_proj")], name=name, **config)
        (job,) = weft.plan_merge(base, folder).plan.jobs
        assert dict(job.expression.deltas[0].params) == {"rotary_heads": heads}


def test_order_of_hugging_face(folder: Path, folders: Folders) -> None:
    (job,) = plan(folder, folders, model_type="qwen2").jobs
    assert job.expression.deltas[0].params == ()


@pytest.mark.parametrize("model", ["phi3", None])
def test_order_that_nobody_tells(folder: Path, folders: Folders, model: str | None) -> None:
    with pytest.raises(PlanError, match="whose rows torchtune orders by the model") as error:
        plan(folder, folders, model_type=model)
    assert len(error.value.problems) == 1
    assert f"is {model or 'not told'}" in str(error.value)
    assert "adapter_model.safetensors" in str(error.value.hint)


@pytest.mark.parametrize("heads", [None, 3, 8, "2", True, 0])
def test_heads_that_do_not_divide_the_rows(folder: Path, folders: Folders, heads: Any) -> None:
    with pytest.raises(PlanError, match=f"has 8 rows, and .* says num_attention_heads = {heads}"):
        plan(folder, folders, num_attention_heads=heads)


def test_copy_of_qwen2_is_doubtful(folders: Folders) -> None:
    """Torchtune reorders the rows of every model in its copy for PEFT, and Qwen2's were right."""
    adapter = folders.adapter([HF_Q])
    config = json.loads((adapter / "adapter_config.json").read_text())
    known = {"r", "lora_alpha", "target_modules", "peft_type"}
    bare = {key: value for key, value in config.items() if key in known}
    (adapter / "adapter_config.json").write_text(json.dumps(bare))
    qwen = folders.base([HF_Q], name="qwen", model_type="qwen2")
    (warning,) = weft.plan_merge(qwen, adapter).warnings
    assert "give torchtune's own adapter_model.pt instead" in warning
    llama = folders.base([HF_Q], name="llama")
    assert weft.plan_merge(llama, adapter).warnings == ()
    (adapter / "adapter_config.json").write_text(json.dumps(bare | {"task_type": "CAUSAL_LM"}))
    assert weft.plan_merge(qwen, adapter).warnings == ()


def test_a_file_that_strayed_into_a_folder_of_peft(folders: Folders) -> None:
    """PEFT's config and weights are there: what is called as torchtune's is not the adapter."""
    adapter = folders.adapter(peft_version="0.21.2", task_type="CAUSAL_LM")
    torch.save({"weight": torch.ones(2)}, adapter / "adapter_0.pt")
    found = weft.inspect(adapter)
    assert isinstance(found, Adapter)
    assert found.format == "PEFT"
    (note,) = found.notes
    assert note.startswith("adapter_0.pt is called as an adapter of torchtune")
    assert weft.merge(folders.base(), adapter, output=folders.root / "out").totals.changed == 1
