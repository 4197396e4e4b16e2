"""Every disturbance of a sound adapter's keys comes back to the sound keys, or is a problem."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.formats.adapters._repairs import repair

ENDINGS = [
    *(".lora_A.weight", ".lora_B.weight", ".lora_B.bias"),
    *(".lora_embedding_A", ".lora_embedding_B"),
    *(".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    ".token_adapter.trainable_tokens_delta",
]
P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
SOUND = [
    f"{P}{Q}.lora_A.weight",
    f"{P}{Q}.lora_B.weight",
    f"{P}{Q}.lora_B.bias",
    f"{P}{Q}.lora_magnitude_vector",
    f"{P}{Q}.base_layer.bias",
    f"{P}model.embed_tokens.lora_embedding_A",
    f"{P}model.embed_tokens.lora_embedding_B",
    f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta",
    f"{P}model.embed_tokens.base_layer.weight",
    f"{P}lm_head.weight",
    f"{P}module.deep.lora_A.weight",  # a module may be called so
]

DISTURBANCES = {
    "adapter name": lambda k: named(k, "default"),
    "another name": lambda k: named(k, "my-run_2"),
    "twice named": lambda k: named(k, "default.default"),
    "no prefix": lambda k: k.removeprefix(P),
    "doubled prefix": lambda k: P + k,
    "trebled prefix": lambda k: P + P + k,
    "torch.compile in front": lambda k: f"_orig_mod.{k}",
    "torch.compile inside": lambda k: k.replace(P, f"{P}_orig_mod."),
    "data parallel": lambda k: f"module.{k}",
    "data parallel inside": lambda k: k.replace(P, f"{P}module."),
    "FSDP": lambda k: k.replace("model.", "model._fsdp_wrapped_module."),
    "checkpointing": lambda k: k.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "all wrappers": lambda k: f"module._orig_mod.{k}".replace(
        "layers.0.", "layers.0._fsdp_wrapped_module."
    ),
    "no weight": lambda k: k.removesuffix(".weight") if ".lora_" in k else k,
    "no weight, a name": lambda k: (
        named(k, "x").removesuffix(".weight") if ".lora_" in k else named(k, "x")
    ),
    "a weight too many": lambda k: f"{k}.weight" if ".lora_embedding_" in k else k,
    "Kohya's words": lambda k: k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "base_layer": lambda k: k.replace(".lora_", ".base_layer.lora_"),
}


def named(key: str, name: str) -> str:
    """As the key is in memory."""
    for stem in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        key = key.replace(f".{stem}.", f".{stem}.{name}.")
        key = f"{key}.{name}" if key.endswith(f".{stem}") else key
    for stem in ("lora_magnitude_vector", "trainable_tokens_delta"):
        key = f"{key}.{name}" if key.endswith(f".{stem}") else key
    if key.endswith("lm_head.weight"):
        key = key.replace("lm_head.weight", f"lm_head.modules_to_save.{name}.weight")
    return key


@pytest.mark.parametrize("name", DISTURBANCES)
def test_comes_back(name: str) -> None:
    disturbed = [DISTURBANCES[name](key) for key in SOUND]
    assert disturbed != SOUND
    found = repair(disturbed, ENDINGS)
    assert found.keys == dict(zip(SOUND, disturbed, strict=True))
    assert found.repairs
    assert not found.problems
    for one in found.repairs:
        assert one.old in str(one)
        assert one.new in str(one)


def test_sound_keys_stay() -> None:
    found = repair(SOUND, ENDINGS)
    assert found.keys == {key: key for key in SOUND}
    assert found.repairs == found.problems == ()


# One of each pair that undo each other, or that no tool combines, stays out.
COMBINED = sorted(set(DISTURBANCES) - {"all wrappers", "data parallel inside", "data parallel"})


@given(st.lists(st.sampled_from(COMBINED), max_size=3, unique=True))
def test_several_at_once(names: list[str]) -> None:
    key = SOUND[0]
    for name in names:
        # Keys lose what a later disturbance looks for: then there is nothing to add to it.
        key = DISTURBANCES[name](key)
    found = repair([key], ENDINGS)
    assert found.keys in ({SOUND[0]: key}, {f"{P}{Q}.lora_A.weight": key})


@pytest.mark.parametrize("ending", ["lora_A.bias", "lora_B.weight.weight", "lora_C.weight"])
def test_not_guessed(ending: str) -> None:
    key = f"{P}{Q}.{ending}"
    assert repair([key], ENDINGS).keys == {key: key}


def test_two_adapters_in_one_file() -> None:
    keys = [f"{P}{Q}.lora_A.{name}.weight" for name in ("one", "two")]
    (problem,) = repair(keys, ENDINGS).problems
    assert "several adapters ('one', 'two')" in problem.what
    assert all(key in problem.what for key in keys)


@pytest.mark.parametrize("names", [("one", "two"), ("one", "")])
def test_two_adapters_that_do_not_meet(names: tuple[str, str]) -> None:
    """On other modules each, they would be merged as one."""
    keys = [
        f"{P}model.layers.{n}.q_proj.lora_{half}.{name}.weight".replace("..", ".")
        for n, name in enumerate(names)
        for half in "AB"
    ]
    (problem,) = repair(keys, ENDINGS).problems
    assert "several adapters" in problem.what


def test_one_tensor_twice() -> None:
    keys = [SOUND[0], SOUND[0].removeprefix(P)]
    (problem,) = repair(keys, ENDINGS).problems
    assert "more than once" in (problem.hint or "")


def test_nested_layers_keep_their_base_layer() -> None:
    key = f"{P}model.layers.0.mlp.experts.base_layer.lora_A.weight"
    assert repair([key], ENDINGS, nested=True).keys == {key: key}
