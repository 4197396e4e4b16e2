"""The folders that trainers leave: read as they are, or refused with what to do instead."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from weft.core.errors import FormatError, NotFound, PlanError, Unsupported
from weft.formats.adapters import open_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Folders

P = "base_model.model."
MODULES = [
    f"model.layers.{n}.{name}" for n in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")
]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TRAINER = (
    *("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("README.md", "rng_state_0.pth", "scaler.pt"),
)
# get_peft_model of Unsloth writes such a pattern into target_modules.
UNSLOTH_TARGETS = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|up_proj)))"
)


def edit(adapter: Path, **config: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({change(key): value for key, value in load_file(file).items()}, file)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def check(folders: Folders, adapter: Path) -> weft.Report:
    """It merges to the bytes of the same adapter as PEFT saves it, and without a warning."""
    base = folders.base(MODULES)
    sound = folders.adapter(MODULES, name="sound")
    weft.merge(base, sound, output=folders.root / "expected")
    report = weft.merge(base, adapter, output=folders.root / "out")
    name = "model.safetensors"
    assert (folders.root / "out" / name).read_bytes() == (
        folders.root / "expected" / name
    ).read_bytes()
    assert report.warnings == ()
    return report


# -------------------------------------------------------------------------------- folders that work


def test_unsloth(folders: Folders) -> None:
    adapter = folders.adapter(MODULES)
    mapping = {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}
    mapping["parent_library"] = "transformers.models.llama.modeling_llama"
    edit(
        adapter,
        auto_mapping=mapping,
        target_modules=UNSLOTH_TARGETS,
        base_model_name_or_path="unsloth/tiny-bnb-4bit",
        peft_version="0.18.0",
    )
    touch(adapter, *TOKENIZER, "chat_template.jinja", "README.md")
    notes = check(folders, adapter).manifest["notes"]
    assert not [note for note in notes if "does not know" in note or "not copied" in note]


def test_llama_factory(folders: Folders) -> None:
    adapter = folders.adapter(MODULES)
    touch(adapter, *TOKENIZER, *TRAINER, "trainer_log.jsonl", "train_results.json")
    touch(adapter, "all_results.json", "training_loss.png", "training_eval_loss.png")
    touch(adapter, "llamaboard_config.yaml", "running_log.txt", "training_args.yaml")
    touch(adapter, "value_head.safetensors", "checkpoint-10/adapter_config.json")
    notes = check(folders, adapter).manifest["notes"]
    assert [note.partition(": ")[2] for note in notes if "not copied" in note] == [
        "value_head.safetensors"
    ]


def test_ms_swift(folders: Folders) -> None:
    adapter = folders.adapter(MODULES)
    edit(adapter, lora_dtype="AUTO", lorap_lr_ratio=None, lorap_emb_lr=1e-6)
    touch(adapter, "args.json", "additional_config.json", "configuration.json", *TRAINER)
    notes = check(folders, adapter).manifest["notes"]
    assert not [note for note in notes if "does not know" in note or "not copied" in note]


def test_tuner_of_ms_swift_itself(folders: Folders) -> None:
    """A folder per adapter, keys without PEFT's prefix and with the adapter's name."""
    run = folders.root / "run"
    adapter = folders.adapter(MODULES, name="run/default")
    edit(adapter, swift_type="LORA", use_merged_linear=False, use_qa_lora=False, enable_lora=None)
    rename(adapter, lambda k: k.removeprefix(P).replace(".weight", ".default.weight"))
    touch(run, "configuration.json")
    with pytest.raises(NotFound) as error:
        open_adapter(run, "run")
    assert error.value.hint == f"give the one that is meant, such as {adapter}"
    assert len(check(folders, adapter).manifest["repairs"]) == 2
    edit(adapter, use_qa_lora=True)
    with pytest.raises(Unsupported, match="sets use_qa_lora"):
        open_adapter(adapter, "run")


def test_axolotl(folders: Folders) -> None:
    adapter = folders.adapter(MODULES)
    touch(adapter, *TOKENIZER, "config.json", "checkpoint-10/adapter_config.json", "debug.log")
    rename(adapter, lambda k: k.replace(P, P + "_orig_mod."))
    report = check(folders, adapter)
    (note,) = [note for note in report.manifest["notes"] if "not copied" in note]
    assert note.endswith("config.json, debug.log")


def test_deepspeed(folders: Folders) -> None:
    """A step's folder, with the state of the optimiser beside the adapter."""
    adapter = folders.adapter(MODULES)
    touch(adapter, *TRAINER, "latest", "zero_to_fp32.py")
    touch(adapter, "global_step10/mp_rank_00_model_states.pt")
    notes = check(folders, adapter).manifest["notes"]
    assert not [note for note in notes if "not copied" in note]


def test_gathered_by_deepspeed(folders: Folders) -> None:
    """What `zero_to_fp32.py --exclude_frozen_parameters` makes, under the adapter's name."""
    adapter = folders.adapter(MODULES)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    named = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    torch.save(named, adapter / "adapter_model.bin")
    check(folders, adapter)


@pytest.mark.parametrize(
    "wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."]
)
def test_fsdp(folders: Folders, wrapper: str) -> None:
    adapter = folders.adapter(MODULES)
    rename(adapter, lambda k: k.replace("layers.0.", f"layers.0.{wrapper}"))
    assert check(folders, adapter).manifest["repairs"]


def test_adapters_beside_each_other(folders: Folders) -> None:
    """TRL keeps a reference in a folder of its name; the one above is the trained one."""
    adapter = folders.adapter(MODULES)
    folders.adapter(MODULES, name="adapter/reference")
    check(folders, adapter)


# ------------------------------------------------------------------------- folders that do not work


def test_folder_of_a_callback(folders: Folders) -> None:
    """QLoRA's and Axolotl's callbacks put the adapter of a step one folder further down."""
    inside = folders.adapter(MODULES, name="run/checkpoint-900/adapter_model")
    folders.adapter(MODULES, name="run/checkpoint-1000/adapter_model")
    touch(folders.root / "run/checkpoint-900", *TRAINER)
    step, run = inside.parent, inside.parent.parent
    with pytest.raises(NotFound, match="the folders adapter_model inside it have") as error:
        open_adapter(step, "a")
    assert error.value.hint == f"give the one that is meant, such as {inside}"
    with pytest.raises(NotFound, match="checkpoint-900/adapter_model, checkpoint-1000") as error:
        open_adapter(run, "a")
    assert str(error.value.hint).endswith("run/checkpoint-1000/adapter_model")
    check(folders, inside)


def test_whole_model_beside_the_adapter(folders: Folders) -> None:
    """The same callbacks, where the trainer's own save was not taken away."""
    inside = folders.adapter(MODULES, name="run/checkpoint-9/adapter_model")
    save_file({"a": torch.ones(1)}, inside.parent / "model.safetensors")
    with pytest.raises(NotFound, match="the folders adapter_model inside it have"):
        open_adapter(inside.parent, "a")


def test_many_steps(folders: Folders) -> None:
    for step in (100, 20, 3, 1000, 500):
        folders.adapter(MODULES, name=f"run/checkpoint-{step}")
    with pytest.raises(NotFound) as error:
        open_adapter(folders.root / "run", "a")
    listed = "checkpoint-3, checkpoint-20, checkpoint-100 … checkpoint-1000"
    assert f"the folders {listed} inside it have" in str(error.value)


def test_folder_of_a_worker(folders: Folders) -> None:
    """Verl puts it three folders down."""
    folders.adapter(MODULES, name="run/global_step_10/actor/lora_adapter")
    with pytest.raises(NotFound, match="global_step_10/actor/lora_adapter inside it have"):
        open_adapter(folders.root / "run", "a")


@pytest.mark.parametrize(
    ("file", "what", "hint"),
    [
        ("pytorch_model_fsdp_0/__0_0.distcp", "shards that FSDP saved apart", "merge-weights"),
        (
            "global_step10/mp_rank_00_model_states.pt",
            "shards that DeepSpeed saved apart",
            "zero_to_fp32.py",
        ),
        ("adapters.npz", "an adapter of mlx-lm before 0.9", "adapters.safetensors"),
    ],
)
def test_shards_alone(folders: Folders, file: str, what: str, hint: str) -> None:
    step = folders.root / "checkpoint-10"
    touch(step, file, *TRAINER)
    with pytest.raises(NotFound, match=what) as error:
        open_adapter(step, "a")
    assert hint in str(error.value.hint)


def test_config_and_shards(folders: Folders) -> None:
    adapter = folders.adapter(MODULES)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFound) as error:
        open_adapter(adapter, "a")
    assert "finish the download" in str(error.value.hint)
    touch(adapter, "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(NotFound) as error:
        open_adapter(adapter, "a")
    assert "zero_to_fp32.py" in str(error.value.hint)


def test_nothing_gathered(folders: Folders) -> None:
    """ZeRO-3: tensors without elements, or a file without tensors."""
    adapter = folders.adapter(MODULES)
    file = adapter / "adapter_model.safetensors"
    save_file({key: torch.empty(0) for key in load_file(file)}, file)
    with pytest.raises(PlanError, match=r"is empty, shape \[0\]") as error:
        open_adapter(adapter, "a")
    assert "saved without gathering its shards" in str(error.value.hint)
    touch(adapter, "global_step10/zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(PlanError) as error:
        open_adapter(adapter, "a")
    assert "zero_to_fp32.py" in str(error.value.hint)
    save_file({}, file)
    with pytest.raises(FormatError, match="holds no tensors") as failed:
        open_adapter(adapter, "a")
    assert "zero_to_fp32.py" in str(failed.value.hint)


def test_no_adapter_at_all(folders: Folders) -> None:
    touch(folders.root / "run", "config.json")
    with pytest.raises(NotFound, match=r"it has no adapter_config\.json$"):
        open_adapter(folders.root / "run", "a")
