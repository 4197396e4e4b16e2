"""PEFT's adapter folders: what is read, and what is refused by name before anything is merged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from weft.core.errors import FormatError, NotFound, NumericsError, PlanError, Unsupported, WeftError
from weft.execute.health import examine
from weft.formats.adapters import _peft_config as variants
from weft.formats.adapters import _peft_lora as lora
from weft.formats.adapters import formats, is_adapter, open_adapter
from weft.formats.adapters import peft as reader
from weft.plan import preflight

if TYPE_CHECKING:
    from torch import Tensor

    from weft.core.specs import Adapter

PREFIX = "base_model.model."
LAYER = "model.layers.0.mlp.up_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["up_proj"],
}


def low_rank(
    module: str = LAYER, rank: int = 2, inputs: int = 8, outputs: int = 8
) -> dict[str, Tensor]:
    torch.manual_seed(len(module))
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, inputs),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(outputs, rank),
    }


def make(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def make_base(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


def read(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Adapter:
    make(folder, low_rank() if tensors is None else tensors, **config)
    return open_adapter(folder, "the/adapter")


def problems(folder: Path, tensors: dict[str, Tensor], **config: Any) -> list[str]:
    """Everything that is found to be wrong, line by line."""
    with pytest.raises(PlanError) as error:
        read(folder, tensors, **config)
    assert str(folder / "adapter_model.safetensors") in str(error.value) or "lora_alpha" in str(
        error.value
    )
    return [problem.what for problem in error.value.problems]


def one_problem(folder: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    (found,) = problems(folder, tensors, **config)
    return found


# ------------------------------------------------------------------------------------ what is read


def test_plain(folder: Path) -> None:
    adapter = read(folder, base_model_name_or_path="org/base", revision="v1")
    (entry,) = adapter.entries
    assert (entry.module, entry.parameter, entry.kind, entry.scaling) == (
        LAYER,
        "weight",
        "lora",
        2,
    )
    assert [role for role, _ in entry.tensors] == ["A", "B"]
    assert (adapter.given, adapter.kind) == ("the/adapter", "LORA")
    assert (adapter.base_model, adapter.revision) == ("org/base", "v1")
    assert adapter.notes == ()
    assert {ref.name for _, ref in entry.tensors} == set(adapter.tensors)


@pytest.mark.parametrize("old", [False, True])
def test_from_bin(old: bool, folder: Path) -> None:
    make(folder, low_rank())
    expected = open_adapter(folder, "x")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(low_rank(), folder / "adapter_model.bin", _use_new_zipfile_serialization=not old)
    found = open_adapter(folder, "x")
    assert found.files[0].endswith("adapter_model.bin")
    assert [e.target for e in found.entries] == [e.target for e in expected.entries]
    for name, ref in found.tensors.items():
        data = bytearray(Path(ref.file).read_bytes()[ref.start : ref.stop])
        values = torch.frombuffer(data, dtype=torch.float32).view(ref.shape)
        assert torch.equal(values, low_rank()[name])


def test_safetensors_before_bin(folder: Path) -> None:
    make(folder, low_rank())
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    assert open_adapter(folder, "x").files[0].endswith(".safetensors")


def test_one_of_its_files_stands_for_the_folder(folder: Path) -> None:
    make(folder, low_rank())
    torch.save(low_rank(), folder / "adapter_model.bin")
    whole = open_adapter(folder, "x")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert is_adapter(folder / name)
        assert open_adapter(folder / name, "x") == whole
    # Which of the two it is, is not for weft to choose where it was said.
    found = open_adapter(folder / "adapter_model.bin", "x")
    assert found.files[0] == str(folder / "adapter_model.bin")
    assert found.folder == whole.folder


def test_a_file_that_is_no_adapter(folder: Path) -> None:
    make(folder, low_rank())
    for name in ("adapter_model.safetensors", "other.safetensors"):
        (folder / "adapter_model.safetensors").replace(folder / name)
        (folder / "adapter_config.json").unlink(missing_ok=True)
        assert not is_adapter(folder / name)
        with pytest.raises(NotFound, match=rf"{name}: no adapter_config\.json beside it") as error:
            open_adapter(folder / name, "x")
        assert "folder" in str(error.value.hint)
        (folder / name).replace(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 2),
        ({"lora_alpha": 3}, 1.5),
        ({"lora_alpha": 0.5}, 0.25),
        ({"lora_alpha": 0}, 0),
        ({"lora_alpha": -4}, -2),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"use_rslora": False}, 2),
        ({"alpha_pattern": {"up_proj": 16}}, 8),
        ({"alpha_pattern": {"proj": 16}}, 2),
        ({"alpha_pattern": {r".*\.mlp\.up_proj": 16}}, 8),
        ({"alpha_pattern": {"^model.layers.0.mlp.up_proj": 16}}, 8),
        ({"alpha_pattern": {"down_proj": 16, "up_proj": 8}}, 4),
        ({"alpha_pattern": {"up_proj": 8, "mlp.up_proj": 8}}, 4),
        ({"r": 7, "rank_pattern": {"up_proj": 2}}, 2),
        ({"r": 7, "rank_pattern": {"up_proj": 2}, "use_rslora": True}, 4 / math.sqrt(2)),
        ({"r": 2, "rank_pattern": {"down_proj": 7}}, 2),
    ],
)
def test_scaling(config: dict[str, Any], expected: float, folder: Path) -> None:
    (entry,) = read(folder, **config).entries
    assert entry.scaling == pytest.approx(expected, rel=1e-12, abs=0)


def test_embedding(folder: Path) -> None:
    tensors = {
        f"{PREFIX}embed.lora_embedding_A": torch.randn(2, 10),
        f"{PREFIX}embed.lora_embedding_B": torch.randn(8, 2),
    }
    (entry,) = read(folder, tensors).entries
    assert (entry.target, entry.kind) == ("embed.weight", "lora")
    assert dict(entry.params) == {"transposed": True}


@pytest.mark.parametrize("ending", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora(ending: str, folder: Path) -> None:
    tensors = low_rank() | {f"{PREFIX}{LAYER}.{ending}": torch.ones(8)}
    (entry,) = read(folder, tensors, use_dora=True).entries
    assert entry.kind == "dora"
    assert [role for role, _ in entry.tensors] == ["A", "B", "magnitude"]


def test_bias_of_lora_b(folder: Path) -> None:
    tensors = low_rank() | {f"{PREFIX}{LAYER}.lora_B.bias": torch.ones(8)}
    weight, bias = read(folder, tensors, lora_bias=True).entries
    assert (weight.target, weight.kind) == (f"{LAYER}.weight", "lora")
    assert (bias.target, bias.kind, bias.scaling) == (f"{LAYER}.bias", "lora_bias", 2)


def test_full_tensors(folder: Path) -> None:
    """modules_to_save, trained biases, an embedding saved along with LoRA on top."""
    tensors = low_rank() | {
        f"{PREFIX}score.weight": torch.ones(2, 8),
        f"{PREFIX}{LAYER}.bias": torch.ones(8),
        f"{PREFIX}lm_head.base_layer.weight": torch.ones(10, 8),
    }
    entries = read(folder, tensors, modules_to_save=["score"]).entries
    found = {entry.target: (entry.kind, entry.saved_as, dict(entry.params)) for entry in entries}
    assert found == {
        f"{LAYER}.weight": ("lora", None, {}),
        "score.weight": ("replace", "score", {}),
        f"{LAYER}.bias": ("replace", None, {}),
        "lm_head.weight": ("replace", None, {"own_base": True}),
    }


@pytest.mark.parametrize(
    "indices", [[5, 1, 3], {"embed": [5, 1, 3]}, {"model.embed": [5, 1, 3], "other": [1]}]
)
def test_trainable_tokens(indices: Any, folder: Path) -> None:
    tensors = {f"{PREFIX}model.embed.token_adapter.trainable_tokens_delta": torch.ones(3, 8)}
    (entry,) = read(folder, tensors, trainable_token_indices=indices).entries
    assert (entry.target, entry.kind) == ("model.embed.weight", "trainable_tokens")
    assert dict(entry.params) == {"indices": (5, 1, 3)}


def test_tokenizer_files_are_found(folder: Path) -> None:
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "other.json"):
        (folder / name).write_text("{}")
    assert read(folder).side_files == ("chat_template.jinja", "tokenizer.json")


def test_every_tensor_is_used(folder: Path) -> None:
    """The ledger: no tensor of the file is left aside in silence."""
    tensors = (
        low_rank()
        | low_rank("model.layers.1.mlp.up_proj")
        | {f"{PREFIX}norm.weight": torch.ones(8)}
    )
    adapter = read(folder, tensors)
    used = [ref.name for entry in adapter.entries for _, ref in entry.tensors]
    assert sorted(used) == sorted(adapter.tensors) == sorted(tensors)


# ------------------------------------------------------------------------------------ other folders


def test_detection(folder: Path, tmp_path: Path) -> None:
    make(folder, low_rank())
    assert is_adapter(folder)
    assert [form.detect(folder) for form in formats()].count(True) == 1
    assert not is_adapter(tmp_path)
    assert not is_adapter(tmp_path / "adapter_config.json")
    with pytest.raises(NotFound, match="no adapter in"):
        open_adapter(tmp_path, "x")


def test_two_formats_that_claim_one_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(folder, low_rank())
    monkeypatch.setattr("weft.formats.adapters.formats", lambda: [reader, reader])
    with pytest.raises(FormatError, match="could be an adapter in the formats peft and peft"):
        open_adapter(folder, "x")


def test_without_weights(folder: Path) -> None:
    make(folder, low_rank())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFound, match=r"no adapter_model\.safetensors or \.bin") as error:
        open_adapter(folder, "x")
    assert str(folder) in str(error.value)


def test_without_tensors(folder: Path) -> None:
    with pytest.raises(FormatError, match="holds no tensors"):
        read(folder, {})


# ---------------------------------------------------------------------------------- refused by name

KINDS = ["lora", "NEW_KIND"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds(kind: str, folder: Path) -> None:
    with pytest.raises(Unsupported, match=f"the/adapter is a {kind} adapter") as error:
        read(folder, peft_type=kind)
    assert "merge_and_unload" in str(error.value.hint)


@pytest.mark.parametrize("kind", variants.NOT_MERGED)
def test_kinds_without_a_merged_weight(kind: str, folder: Path) -> None:
    message = f"the/adapter is a {kind} adapter, which cannot be merged: "
    with pytest.raises(Unsupported, match=message) as error:
        read(folder, peft_type=kind)
    assert variants.NOT_MERGED[kind] in str(error.value)


# Each variant of LoRA that is known and not merged, as PEFT would write it, and its name.
VARIANTS = {
    "megatron_config": ({"tp": 2}, "Megatron"),
    "alora_invocation_tokens": ([1, 2], "aLoRA"),
    "arrow_config": ({"top_k": 2}, "Arrow"),
}


def test_every_variant_has_a_test() -> None:
    assert set(VARIANTS) == set(variants.VARIANTS)
    assert set(MOVED) == set(variants._MOVED_INIT)
    assert set(QUANTISED) == {*preflight._QUANTISED_NAMES}
    assert {key.removeprefix(PREFIX + "m.") for key in ENDINGS} == {
        ending.removeprefix(".") for ending in lora.SUFFIXES
    }


@pytest.mark.parametrize("field", VARIANTS)
def test_variants(field: str, folder: Path) -> None:
    value, name = VARIANTS[field]
    with pytest.raises(Unsupported, match=f"the/adapter uses .*{name}") as error:
        read(folder, **{field: value})
    # Where there is no merged weight at all, PEFT has none either.
    assert (error.value.hint is None) == (name in ("aLoRA", "Arrow"))


@pytest.mark.parametrize("field", VARIANTS)
@pytest.mark.parametrize("off", [None, False, [], {}])
def test_variants_that_are_off(field: str, off: Any, folder: Path) -> None:
    assert len(read(folder, **{field: off}).entries) == 1


MOVED = {
    "pissa": ("pissa", "PiSSA"),
    "olora": ("olora", "OLoRA"),
    "loftq": ("loftq", "LoftQ"),
    "corda": ("corda", "CorDA"),
    "lora_ga": ("lora_ga", "LoRA-GA"),
}


@pytest.mark.parametrize("key", [*MOVED, "pissa_niter_16"])
def test_initialisations_that_moved_the_base(key: str, folder: Path) -> None:
    """What is then needed besides is known when there is a base: see oracle/test_moved_base."""
    value, name = MOVED.get(key, (key, "PiSSA"))
    assert read(folder, init_lora_weights=value).moved_base == name


def test_initialisation_that_is_not_known(folder: Path) -> None:
    with pytest.raises(
        Unsupported, match="init_lora_weights='brand_new', which weft does not know"
    ):
        read(folder, init_lora_weights="brand_new")


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_did_not(value: Any, folder: Path) -> None:
    assert len(read(folder, init_lora_weights=value).entries) == 1


@pytest.mark.parametrize(("field", "value"), [("use_newlora", True), ("newlora_config", {"a": 1})])
def test_unknown_variants(field: str, value: Any, folder: Path) -> None:
    with pytest.raises(Unsupported, match=f"sets {field}, a variant of LoRA"):
        read(folder, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("use_newlora", False), ("newlora_config", None), ("newlora_config", {})]
)
def test_unknown_variants_that_are_off(field: str, value: Any, folder: Path) -> None:
    assert read(folder, **{field: value}).notes == ()


def test_unknown_fields_are_noted(folder: Path) -> None:
    notes = read(folder, zeta=3, alpha_beta="x", empty=None).notes
    assert len(notes) == 1
    assert notes[0].endswith("does not know and ignores: alpha_beta, zeta")


# ----------------------------------------------------------------------------------- malformed keys

ENDINGS = {
    f"{PREFIX}m.lora_A.weight": (2, 8),
    f"{PREFIX}m.lora_B.weight": (8, 2),
    f"{PREFIX}m.lora_B.bias": (8,),
    f"{PREFIX}m.lora_embedding_A": (2, 8),
    f"{PREFIX}m.lora_embedding_B": (8, 2),
    f"{PREFIX}m.lora_diag": (2,),
    f"{PREFIX}m.lora_magnitude_vector": (8,),
    f"{PREFIX}m.lora_magnitude_vector.weight": (8,),
    f"{PREFIX}m.token_adapter.trainable_tokens_delta": (2, 8),
}


@pytest.mark.parametrize("key", ENDINGS)
def test_alone(key: str, folder: Path) -> None:
    """No ending makes sense by itself, but for token rows whose indices are known."""
    found = one_problem(folder, {key: torch.ones(ENDINGS[key])})
    if "trainable_tokens" in key:
        assert "trainable_token_indices" in found
    else:
        assert "module 'm'" in found
        assert "lacks lora_" in found


@pytest.mark.parametrize("lost", ["A", "B"])
@pytest.mark.parametrize("embedding", [False, True])
def test_missing_half(lost: str, embedding: bool, folder: Path) -> None:
    tensors = low_rank()
    if embedding:
        tensors = {
            key.replace("lora_", "lora_embedding_").removesuffix(".weight"): value
            for key, value in tensors.items()
        }
    name = f"lora_{'embedding_' * embedding}{lost}"
    del tensors[next(key for key in tensors if name in key)]
    assert one_problem(folder, tensors).endswith(f"lacks {name}")


def test_half_a_prefix(folder: Path) -> None:
    key = "base_model.layers.0.mlp.up_proj.lora_A.weight"
    found = problems(folder, low_rank() | {key: torch.ones(2, 8)})
    assert any(repr(key) in what and f"does not begin with {PREFIX!r}" in what for what in found)


@pytest.mark.parametrize(
    "ending",
    [
        *("lora_A.bias", "lora_C.weight"),
        *("lora_dropout.p", "trainable_tokens_delta.default", "lora_variant.gate"),
    ],
)
def test_unknown_ending(ending: str, folder: Path) -> None:
    found = one_problem(folder, low_rank() | {f"{PREFIX}{LAYER}.{ending}": torch.ones(2, 8)})
    assert f"{ending}' in " in found
    assert "has no ending that weft knows" in found


def test_doubled_key(folder: Path) -> None:
    tensors = low_rank() | {
        f"{PREFIX}{LAYER}.lora_magnitude_vector": torch.ones(8),
        f"{PREFIX}{LAYER}.lora_magnitude_vector.weight": torch.ones(8),
    }
    assert "stands for one seen already" in one_problem(folder, tensors, use_dora=True)


def test_both_kinds_of_factors(folder: Path) -> None:
    tensors = low_rank() | {
        f"{PREFIX}{LAYER}.lora_embedding_A": torch.ones(2, 8),
        f"{PREFIX}{LAYER}.lora_embedding_B": torch.ones(8, 2),
    }
    assert "has both kinds of factors" in one_problem(folder, tensors)


def resized(copy: float, original: bool = True) -> dict[str, Tensor]:
    """What PEFT writes of a module of modules_to_save when the vocabulary was resized."""
    tensors = {
        f"{PREFIX}lm_head.weight": torch.full((4, 8), 1.0),
        f"{PREFIX}lm_head.modules_to_save.weight": torch.full((4, 8), copy),
    }
    if original:
        tensors[f"{PREFIX}lm_head.original_module.weight"] = torch.full((4, 8), 3.0)
    return tensors


@pytest.mark.parametrize("original", [False, True])
def test_module_saved_twice(original: bool, folder: Path) -> None:
    entries = read(folder, resized(1.0, original), modules_to_save=["lm_head"]).entries
    trained = [entry for entry in entries if not entry.params]
    assert [(e.target, e.tensors[0][1].name) for e in trained] == [
        ("lm_head.weight", f"{PREFIX}lm_head.weight")
    ]
    assert len(entries) == 1 + original


def test_module_saved_twice_and_not_alike(folder: Path) -> None:
    found = one_problem(folder, resized(2.0), modules_to_save=["lm_head"])
    assert "lm_head.modules_to_save.weight' and " in found
    assert found.endswith(" differ")


def test_module_of_which_only_the_original_was_saved(folder: Path) -> None:
    tensors = {f"{PREFIX}lm_head.original_module.weight": torch.ones(4, 8)}
    found = one_problem(folder, tensors, modules_to_save=["lm_head"])
    assert "modules_to_save names 'lm_head'" in found
    assert "what it was before training" in found


def test_repaired_keys(folder: Path) -> None:
    """See test_key_repairs.py for all of them; here, that they are read and told."""
    tensors = {
        key.removeprefix(PREFIX).replace(".weight", ".default.weight"): value
        for key, value in low_rank().items()
    }
    adapter = read(folder, tensors)
    (entry,) = adapter.entries
    assert entry.target == f"{LAYER}.weight"
    assert [repair.count for repair in adapter.repairs] == [2, 2]
    told = " ".join(map(str, adapter.repairs))
    assert "'base_model.model.' put before" in told
    assert "'default' taken out" in told


# --------------------------------------------------------------------------------- malformed shapes


def shaped(A: tuple[int, ...], B: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}m.lora_A.weight": torch.ones(A),
        f"{PREFIX}m.lora_B.weight": torch.ones(B),
    }


@pytest.mark.parametrize(
    ("A", "B", "says"),
    [
        ((16,), (8, 2), "are not two matrices"),
        ((2, 8), (16,), "are not two matrices"),
        ((16,), (16,), "are not two matrices"),
        ((), (8, 2), "are not two matrices"),
        ((2, 8), (8, 2, 1), "are not two matrices"),
        ((2, 8, 3), (8, 2, 3), "are not two matrices"),
        ((2, 8, 3), (8, 2), "are not two matrices"),
        ((2, 8, 3), (8, 1, 1), "is a convolution of 2 groups"),
        ((2, 8, 3, 3), (8, 3, 1, 1), "do not share a rank (2 rows of A, 3 columns of B)"),
        ((2, 8), (8, 3), "do not share a rank (2 rows of A, 3 columns of B)"),
        ((8, 2), (2, 8), "has rank 8, and adapter_config.json says r = 2"),
        ((3, 8), (8, 3), "has rank 3, and adapter_config.json says r = 2"),
    ],
)
def test_factors_that_are_no_factors(
    A: tuple[int, ...], B: tuple[int, ...], says: str, folder: Path
) -> None:
    found = one_problem(folder, shaped(A, B))
    assert says in found
    assert "module 'm'" in found


@pytest.mark.parametrize("shape", [(0,), (0, 8), (2, 0), (0, 0)])
def test_zero_sized(shape: tuple[int, ...], folder: Path) -> None:
    found = problems(folder, shaped(shape, (8, 2)))
    assert f"is empty, shape {list(shape)}" in found[0]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 4}, "says r = 4"),
        ({"r": 2.5}, "says r = 2.5"),
        ({"rank_pattern": {"up_proj": 4}}, "says r = 4"),
        ({"rank_pattern": {"up_proj": 4, "mlp.up_proj": 8}}, "says r = 4 or 8"),
        ({"rank_pattern": {"up_proj": 4, "q_proj": 2}}, "says r = 4"),
    ],
)
def test_rank_contradicts_the_config(config: dict[str, Any], says: str, folder: Path) -> None:
    found = one_problem(folder, low_rank(), **config)
    assert f"has rank 2, and adapter_config.json {says}" in found


def test_rank_that_one_of_two_patterns_says(folder: Path) -> None:
    """PEFT takes the first that matches; which that was, can be seen by the tensors."""
    (entry,) = read(folder, rank_pattern={"mlp.up_proj": 8, "up_proj": 2}).entries
    assert entry.scaling == 2


@pytest.mark.parametrize(
    "pattern", [{"up_proj": 8, "mlp.up_proj": 16}, {r".*\.0\..*": 8, "up_proj": 4, ".*": 8}]
)
def test_alpha_is_ambiguous(pattern: dict[str, int], folder: Path) -> None:
    with pytest.raises(PlanError, match="patterns of alpha_pattern that say") as error:
        read(folder, alpha_pattern=pattern)
    for value in set(pattern.values()):
        assert f" {value}" in str(error.value)
    assert "PEFT saves the patterns sorted" in str(error.value.hint)


@pytest.mark.parametrize("alpha", [None, "16", [16], True, math.nan, math.inf, -math.inf])
def test_alpha_is_no_number(alpha: Any, folder: Path) -> None:
    with pytest.raises(FormatError, match=r"adapter_config\.json: lora_alpha = ") as error:
        read(folder, lora_alpha=alpha)
    assert repr(alpha) in str(error.value)
    assert "must be a number" in str(error.value)


def test_alpha_is_missing(folder: Path) -> None:
    make(folder, low_rank())
    config = {key: value for key, value in CONFIG.items() if key != "lora_alpha"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="gives no lora_alpha"):
        open_adapter(folder, "x")


def test_magnitude_without_use_dora(folder: Path) -> None:
    tensors = low_rank() | {f"{PREFIX}{LAYER}.lora_magnitude_vector.weight": torch.ones(8)}
    for config in ({}, {"use_dora": False}, {"use_dora": None}):
        found = one_problem(folder, tensors, **config)
        assert "has a lora_magnitude_vector, and use_dora is False" in found


def test_use_dora_without_magnitude(folder: Path) -> None:
    found = one_problem(folder, low_rank(), use_dora=True)
    assert "has no lora_magnitude_vector, and use_dora is True" in found


def test_use_dora_with_a_magnitude_lost(folder: Path) -> None:
    tensors = low_rank() | low_rank("model.layers.1.mlp.up_proj")
    tensors[f"{PREFIX}{LAYER}.lora_magnitude_vector.weight"] = torch.ones(8)
    found = one_problem(folder, tensors, use_dora=True)
    assert "'model.layers.1.mlp.up_proj'" in found
    assert "has no lora_magnitude_vector" in found


@pytest.mark.parametrize(
    ("shape", "indices"),
    [
        ((3, 8), [1, 2]),
        ((3, 8), [1, 2, 2]),
        ((2, 8), [1, -2]),
        ((2, 8), [1, True]),
        ((2, 8), [1, 2.0]),
        ((2, 8), "12"),
        ((2, 8), None),
        ((2, 8), {}),
        ((2, 8), {"other": [1, 2], "another": [1, 2]}),
        ((2, 8), {"embed": [1, 2], "model.embed": [1, 2]}),
        ((16,), [1, 2]),
        ((2, 8, 1), [1, 2]),
    ],
)
def test_token_rows_that_do_not_fit(shape: tuple[int, ...], indices: Any, folder: Path) -> None:
    tensors = {f"{PREFIX}model.embed.token_adapter.trainable_tokens_delta": torch.ones(shape)}
    found = one_problem(folder, tensors, trainable_token_indices=indices)
    assert "trainable_token_indices" in found
    assert "'model.embed'" in found


# -------------------------------------------------------------------------------- several at once


def test_all_problems_are_listed_at_once(folder: Path) -> None:
    tensors = {
        **low_rank("fine"),
        f"{PREFIX}a.lora_A.weight": torch.ones(2, 8),
        **low_rank("b", rank=3),
        f"{PREFIX}c.lora_A.weight": torch.ones(0),
        f"{PREFIX}c.lora_B.weight": torch.ones(8, 2),
        "d.lora_A.weight": torch.ones(2, 8),
        f"{PREFIX}e.lora_what": torch.ones(2),
    }
    found = problems(folder, tensors)
    for part in ("'a'", "'b'", "c.lora_A.weight' in", "'c'", "'d'", "e.lora_what'"):
        assert sum(part in what for what in found) == 1, part
    assert len(found) == 6
    assert not any("fine" in what for what in found)


def test_alike_problems_are_one_line(folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for n in range(30):
        tensors |= low_rank(f"model.layers.{n}.mlp.up_proj", rank=3)
    with pytest.raises(PlanError) as error:
        read(folder, tensors)
    assert len(error.value.problems) == 30
    first, line = str(error.value).splitlines()
    assert first.startswith("30 problems with the adapter the/adapter")
    assert line.endswith("(and 29 more like it)")
    assert len(str(error.value.hint).splitlines()) == 1


def test_problems_of_two_adapters_are_listed_at_once(tmp_path: Path) -> None:
    make(tmp_path / "one", {f"{PREFIX}a.lora_A.weight": torch.ones(2, 8)})
    make(tmp_path / "two", {f"{PREFIX}b.lora_B.weight": torch.ones(8, 2)})
    base = make_base(tmp_path / "base", {"a.weight": torch.ones(8, 8)})
    with pytest.raises(PlanError) as error:
        weft.plan_merge(base, [tmp_path / "one", tmp_path / "two"])
    assert ["'a'" in error.value.problems[0].what, "'b'" in error.value.problems[1].what] == [
        True
    ] * 2


def test_problems_of_values_and_of_the_base_are_listed_at_once(tmp_path: Path) -> None:
    tensors = low_rank("a") | low_rank("b") | low_rank("c", inputs=6)
    tensors[f"{PREFIX}a.lora_A.weight"][0, 0] = math.nan
    make(tmp_path / "adapter", tensors)
    base = {"a.weight": torch.ones(8, 8), "c.weight": torch.ones(8, 8)}
    make_base(tmp_path / "base", base)
    with pytest.raises(PlanError) as error:
        weft.plan_merge(tmp_path / "base", tmp_path / "adapter")
    found = "\n".join(problem.what for problem in error.value.problems)
    assert "a.lora_A.weight in " in found
    assert "1 of 16 values NaN" in found
    assert "changes b.weight, which" in found
    assert "c.weight is [8, 8] in the base" in found
    assert len(error.value.problems) == 3


# -------------------------------------------------------------------------------- quantised bases

# Names as their writers leave them in a checkpoint, by the ending that the table knows.
QUANTISED = {
    "qweight": ("model.layers.0.mlp.up_proj.qweight", torch.int32, "GPTQ or AWQ"),
    "weight_scale_inv": ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.float32, "FP8"),
    "weight_scale": ("model.layers.0.mlp.up_proj.weight_scale", torch.float32, "FP8"),
    "weight_packed": ("model.layers.0.mlp.up_proj.weight_packed", torch.int32, "compressed"),
    "SCB": ("model.layers.0.mlp.up_proj.SCB", torch.float32, "bitsandbytes, 8 bits"),
    "weight.absmax": ("model.layers.0.mlp.up_proj.weight.absmax", torch.uint8, "4 bits"),
    "weight.quant_map": ("model.layers.0.mlp.up_proj.weight.quant_map", torch.float32, "4 bits"),
}


def refused(base: Path, adapter: Path) -> PlanError:
    with pytest.raises(PlanError, match="is quantised") as error:
        weft.plan_merge(base, adapter)
    assert "16-bit model that it was quantised from" in str(error.value.hint)
    return error.value


@pytest.mark.parametrize("ending", QUANTISED)
def test_quantised_by_names(ending: str, tmp_path: Path) -> None:
    name, dtype, kind = QUANTISED[ending]
    tensors = {f"{LAYER}.weight": torch.ones(8, 8), name: torch.ones(4, 4).to(dtype)}
    base, adapter = make_base(tmp_path / "base", tensors), make(tmp_path / "adapter", low_rank())
    error = refused(base, adapter)
    assert kind in str(error)
    assert name in str(error)
    assert str(base / "model.safetensors") in str(error)


def test_quantised_as_gpt_oss_is(tmp_path: Path) -> None:
    tensors = {
        f"{LAYER}.weight": torch.ones(8, 8),
        "model.layers.0.mlp.experts.gate_up_proj_blocks": torch.ones(2, 4, 4).to(torch.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_scales": torch.ones(2, 4).to(torch.uint8),
    }
    base, adapter = make_base(tmp_path / "base", tensors), make(tmp_path / "adapter", low_rank())
    assert "MXFP4" in str(refused(base, adapter))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"bits": 3}, "by a method that it does not name"),
    ],
)
@pytest.mark.parametrize("inner", [False, True])
def test_quantised_by_config(
    config: dict[str, Any], kind: str, inner: bool, tmp_path: Path
) -> None:
    content: dict[str, Any] = {"quantization_config": config}
    content = {"text_config": content} if inner else content
    base = make_base(tmp_path / "base", {f"{LAYER}.weight": torch.ones(8, 8)}, **content)
    with pytest.raises(PlanError, match=rf"is quantised \({kind}, says its config\.json\)"):
        weft.plan_merge(base, make(tmp_path / "adapter", low_rank()))


@pytest.mark.parametrize("config", [None, {}, {"quantization_config": None}])
def test_not_quantised(config: dict[str, Any] | None, tmp_path: Path) -> None:
    tensors = {f"{LAYER}.weight": torch.ones(8, 8), "scale.weight": torch.ones(2)}
    base = make_base(tmp_path / "base", tensors, **(config or {}))
    assert weft.plan_merge(base, make(tmp_path / "adapter", low_rank())).work.changed == 1


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "uint8"])
def test_target_of_a_narrow_dtype(dtype: str, tmp_path: Path) -> None:
    base = make_base(
        tmp_path / "base", {f"{LAYER}.weight": torch.ones(8, 8).to(getattr(torch, dtype))}
    )
    with pytest.raises(PlanError, match=f"is {dtype}, and ΔW cannot be added"):
        weft.plan_merge(base, make(tmp_path / "adapter", low_rank()))


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "ending",
    ["lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector.weight"],
)
def test_not_finite(ending: str, dtype: str, value: float, folder: Path) -> None:
    tensors = low_rank() | {
        f"{PREFIX}{LAYER}.lora_B.bias": torch.ones(8),
        f"{PREFIX}{LAYER}.lora_magnitude_vector.weight": torch.ones(8),
    }
    tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
    tensors[f"{PREFIX}{LAYER}.{ending}"].view(-1)[3:5] = value
    found, _ = examine(read(folder, tensors, use_dora=True))
    assert len(found) == 1
    count = tensors[f"{PREFIX}{LAYER}.{ending}"].numel()
    assert f"{ending} in {folder}" in found[0].what
    assert f"has 2 of {count} values NaN or infinite" in found[0].what


def test_token_rows_that_are_not_finite(folder: Path) -> None:
    tensors = {f"{PREFIX}embed.token_adapter.trainable_tokens_delta": torch.full((1, 8), math.nan)}
    found, _ = examine(read(folder, tensors, trainable_token_indices=[3]))
    assert "8 of 8 values NaN" in found[0].what


@pytest.mark.parametrize(
    "dtype",
    ["int8", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool", "complex64"],
)
def test_factors_that_are_no_floats(dtype: str, folder: Path) -> None:
    tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in low_rank().items()}
    found, _ = examine(read(folder, tensors))
    assert len(found) == 2
    assert f"is {dtype}, not a floating type" in found[0].what


@pytest.mark.parametrize(
    "dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_factors_of_every_floating_type(dtype: str, folder: Path) -> None:
    tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in low_rank().items()}
    assert examine(read(folder, tensors)) == ([], [])


def merge(tmp_path: Path, base: Tensor, **options: Any) -> Tensor:
    """The only tensor of a base with the adapter in `tmp_path / "adapter"` merged into it."""
    made = make_base(tmp_path / "base", {f"{LAYER}.weight": base})
    weft.merge(made, tmp_path / "adapter", output=tmp_path / "out", **options)
    return load_file(tmp_path / "out/model.safetensors")[f"{LAYER}.weight"]


def big(value: float) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{LAYER}.lora_A.weight": torch.full((2, 8), 1.0),
        f"{PREFIX}{LAYER}.lora_B.weight": torch.full((8, 2), value),
    }


def test_overflow_of_float16(tmp_path: Path) -> None:
    """60,000 + 2 · 2 · 2,000 is finite, and more than float16 holds."""
    make(tmp_path / "adapter", big(2000.0))
    base = torch.full((8, 8), 60_000.0, dtype=torch.float16)
    with pytest.raises(NumericsError, match=rf"{LAYER}\.weight overflows float16: it reaches") as e:
        merge(tmp_path, base)
    assert "6.8e+04" in str(e.value)
    assert "--dtype bfloat16" in str(e.value.hint)
    assert not (tmp_path / "out").exists()


def test_just_below_the_overflow(tmp_path: Path) -> None:
    make(tmp_path / "adapter", big(1000.0))
    merged = merge(tmp_path, torch.full((8, 8), 60_000.0, dtype=torch.float16))
    assert merged.dtype == torch.float16
    assert torch.all(merged == 64_000)


def test_overflow_by_a_cast(tmp_path: Path) -> None:
    """Of a tensor that no adapter changes."""
    make(tmp_path / "adapter", low_rank())
    tensors = {f"{LAYER}.weight": torch.ones(8, 8), "norm.weight": torch.full((4,), 1e6)}
    base = make_base(tmp_path / "base", tensors)
    with pytest.raises(NumericsError, match=r"norm\.weight overflows float16: it reaches 1e\+06"):
        weft.merge(base, tmp_path / "adapter", output=tmp_path / "out", dtype="float16")


def test_wider_output_does_not_overflow(tmp_path: Path) -> None:
    make(tmp_path / "adapter", big(2000.0))
    base = torch.full((8, 8), 60_000.0, dtype=torch.float16)
    assert torch.all(merge(tmp_path, base, dtype="float32") == 68_000)


def test_product_that_overflows_float32(tmp_path: Path) -> None:
    tensors = {key: torch.full_like(value, 1e30) for key, value in big(1.0).items()}
    make(tmp_path / "adapter", tensors)
    with pytest.raises(NumericsError, match=f"the update of {LAYER}.weight is NaN or infinite"):
        merge(tmp_path, torch.ones(8, 8))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_base_that_is_not_finite(value: float, tmp_path: Path) -> None:
    make(tmp_path / "adapter", low_rank())
    base = torch.ones(8, 8)
    base[3, 3] = value
    with pytest.raises(NumericsError, match=rf"the base's {LAYER}\.weight holds NaN or infinity"):
        merge(tmp_path, base)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_replacement_that_is_not_finite(value: float, tmp_path: Path) -> None:
    tensors = low_rank() | {f"{PREFIX}norm.weight": torch.full((4,), value)}
    make(tmp_path / "adapter", tensors, modules_to_save=["norm"])
    base = {f"{LAYER}.weight": torch.ones(8, 8), "norm.weight": torch.ones(4)}
    made = make_base(tmp_path / "base", base)
    with pytest.raises(WeftError, match=r"norm\.weight.*(NaN|infinit)"):
        weft.merge(made, tmp_path / "adapter", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------- adapters that do nothing


@pytest.mark.parametrize("which", ["A", "B"])
def test_all_zero_factors_are_a_warning(which: str, tmp_path: Path) -> None:
    tensors = low_rank() | low_rank("model.layers.1.mlp.up_proj")
    tensors = {k: v * (f"lora_{which}" not in k) for k, v in tensors.items()}
    adapter = make(tmp_path / "adapter", tensors)
    found, warnings = examine(open_adapter(adapter, "the/adapter"))
    assert found == []
    assert len(warnings) == 1
    assert warnings[0].startswith("the/adapter changes nothing: ")
    assert " all 2 modules" in warnings[0]
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(2)]
    base = make_base(tmp_path / "base", {name: torch.ones(8, 8) for name in names})
    report = weft.merge(base, adapter, output=tmp_path / "out")
    assert report.totals.changed == 0
    assert any("changes nothing" in warning for warning in report.warnings)
    assert any("the output equals the base" in warning for warning in report.warnings)
    merged = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(tensor, torch.ones(8, 8)) for tensor in merged.values())


def test_some_zero_factors_are_none(folder: Path) -> None:
    """A layer that did not learn is no reason to doubt the others."""
    tensors = low_rank() | low_rank("model.layers.1.mlp.up_proj")
    tensors[f"{PREFIX}{LAYER}.lora_B.weight"].zero_()
    assert examine(read(folder, tensors)) == ([], [])


# ------------------------------------------------------------------------------------ sharded saves


def sharded(ranks: int, mine: int, rows: tuple[int, ...] = (64, 32, 128)) -> dict[str, Tensor]:
    """What one of `ranks` processes has: its rows of every lora_B, and zeros for the rest."""
    tensors: dict[str, Tensor] = {}
    for n, count in enumerate(rows):
        part = low_rank(f"model.layers.{n}.mlp.up_proj", outputs=count)
        B = part[f"{PREFIX}model.layers.{n}.mlp.up_proj.lora_B.weight"]
        keep = torch.zeros(count, dtype=torch.bool)
        keep[count // ranks * mine : count // ranks * (mine + 1)] = True
        B[~keep] = 0
        tensors |= part
    return tensors


@pytest.mark.parametrize(
    ("ranks", "mine"), [(2, 0), (2, 1), (4, 0), (4, 3), (8, 0), (8, 5), (16, 0)]
)
def test_save_of_one_process(ranks: int, mine: int, folder: Path) -> None:
    found, _ = examine(read(folder, sharded(ranks, mine)))
    assert len(found) == 1
    assert f"lora_B is zero but for 1/{ranks} of its rows" in found[0].what
    assert "the/adapter is damaged" in found[0].what
    assert "full state dict" in str(found[0].hint)


def test_save_of_one_process_with_layers_that_did_not_learn(folder: Path) -> None:
    tensors = sharded(4, 1) | low_rank("other", outputs=64)
    tensors[f"{PREFIX}other.lora_B.weight"].zero_()
    found, _ = examine(read(folder, tensors))
    assert len(found) == 1


def test_whole_saves_are_not_suspected(folder: Path) -> None:
    assert examine(read(folder, sharded(1, 0))) == ([], [])
    one_layer_is_half_zero = sharded(1, 0)
    one_layer_is_half_zero[f"{PREFIX}{LAYER}.lora_B.weight"][::2] = 0
    assert examine(read(folder, one_layer_is_half_zero)) == ([], [])
    third = sharded(3, 0, rows=(63, 33, 126))
    assert examine(read(folder, third)) == ([], [])


def test_sharded_save_stops_the_merge(tmp_path: Path) -> None:
    adapter = make(tmp_path / "adapter", sharded(2, 0))
    names = {f"model.layers.{n}.mlp.up_proj.weight": rows for n, rows in enumerate((64, 32, 128))}
    base = make_base(tmp_path / "base", {n: torch.ones(rows, 8) for n, rows in names.items()})
    with pytest.raises(PlanError, match="zero but for 1/2 of its rows"):
        weft.merge(base, adapter, output=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
