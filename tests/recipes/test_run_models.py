"""What `weft run` writes loads in transformers and computes what the recipe says.

Stacked layers, tied and untied embeddings, experts, tensors that no list of architectures has.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from running import VOCABULARY, checkpoint, llama, load, random, run
from safetensors.torch import save_file

from tests.helpers import randomise
from weft.core.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")
IDS = torch.arange(24).view(2, 12)
SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def made(kind: str, seed: int, folder: Path, **config: Any) -> Any:
    """A model of random weights, saved in `folder` in float32."""
    kind_of_model = getattr(transformers, f"{kind}ForCausalLM")
    model = kind_of_model(kind_of_model.config_class(**(SMALL | config)))
    randomise(model, seed)
    model.eval().save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def opened(folder: Path) -> Any:
    """As transformers loads it; nothing may be missing or too much."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()


# ------------------------------------------------------------------------------- stacked layers


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2", "Llama", "Qwen2"])
def test_layers_of_two_models_stacked(kind: str, tmp_path: Path) -> None:
    """The forward pass is that of the layers in their new order, each of its own kind."""
    extra: dict[str, Any] = {}
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    if kind in ("Qwen3", "Gemma2"):
        extra = {"layer_types": types, "sliding_window": 3}
        extra |= {"use_sliding_window": True} if kind == "Qwen3" else {}
        extra |= {"query_pre_attn_scalar": 8} if kind == "Gemma2" else {}
    tied = kind == "Gemma2"
    one = made(kind, 1, tmp_path / "one", tie_word_embeddings=tied, **extra)
    other = dict(extra)
    if "layer_types" in other:
        other["layer_types"] = [*types[::-1][:3], "full_attention"]
    two = made(kind, 2, tmp_path / "two", tie_word_embeddings=tied, **other)
    run(
        tmp_path,
        f"""
        merge_method: passthrough
        slices:
          - sources: [{{model: {tmp_path}/one, layer_range: [0, 3]}}]
          - sources: [{{model: {tmp_path}/two, layer_range: [1, 4]}}]
          - sources: [{{model: {tmp_path}/one, layer_range: [2, 2]}}]
        """,
    )
    order = [(one, 0), (one, 1), (one, 2), (two, 1), (two, 2), (two, 3)]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 6
    reference = stacked(order, **_types(order, extra))
    found = opened(tmp_path / "out")
    assert torch.equal(logits(found), logits(reference))
    if extra:
        assert config["layer_types"] == _types(order, extra)["layer_types"]
        assert len(set(config["layer_types"])) == 2


def _types(order: list[tuple[Any, int]], extra: dict[str, Any]) -> dict[str, Any]:
    return {"layer_types": [m.config.layer_types[old] for m, old in order]} if extra else {}


def stacked(order: list[tuple[Any, int]], **config: Any) -> Any:
    """A model of these layers, made by transformers; what is in no layer is the first one's."""
    one = order[0][0]
    want = {k: v for k, v in one.config.to_dict().items() if k not in ("layer_types", "dtype")}
    built = type(one.config)(**(want | {"num_hidden_layers": len(order)} | config))
    reference = type(one)(built).eval()
    state = {k: v for k, v in one.state_dict().items() if ".layers." not in k}
    for new, (model, old) in enumerate(order):
        part = f"model.layers.{old}."
        for name, value in model.state_dict().items():
            if name.startswith(part):
                state[name.replace(part, f"model.layers.{new}.")] = value
    reference.load_state_dict(state)
    return reference


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Gemma2", {}),
        ("Gemma3", {}),
        ("Gemma3", {"sliding_window_pattern": 3}),
        ("Cohere2", {"sliding_window_pattern": 2}),
    ],
)
def test_kinds_of_attention_that_only_numbers_tell(
    kind: str, said: dict[str, int], tmp_path: Path
) -> None:
    """Configs from before transformers 4.53 have no `layer_types`; moved layers need them."""
    extra: dict[str, Any] = {"num_hidden_layers": 7, "sliding_window": 3} | said
    models = [made(kind, n, tmp_path / str(n), tie_word_embeddings=True, **extra) for n in (1, 2)]
    for n in (1, 2):
        file = tmp_path / f"{n}/config.json"
        config = json.loads(file.read_text())
        del config["layer_types"]
        file.write_text(json.dumps(config | said))
    run(
        tmp_path,
        f"""
        merge_method: passthrough
        slices:
          - sources: [{{model: {tmp_path}/1, layer_range: [0, 3]}}]
          - sources: [{{model: {tmp_path}/2, layer_range: [2, 7]}}]
          - sources: [{{model: {tmp_path}/1, layer_range: [2, 2]}}]
        """,
    )
    order = [(models[0], n) for n in range(3)] + [(models[1], n) for n in range(2, 7)]
    types = [model.config.layer_types[old] for model, old in order]
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_types"] == types
    reference = stacked(order, layer_types=types)
    assert torch.equal(logits(opened(tmp_path / "out")), logits(reference))
    by_number = type(reference.config)(**(SMALL | extra | {"num_hidden_layers": 8}))
    assert by_number.layer_types != types
    notes = json.loads((tmp_path / "out/weft.json").read_text())["notes"]
    assert any("layer_types" in note for note in notes)


def test_sparse_layers_by_their_numbers(tmp_path: Path) -> None:
    """`mlp_only_layers` holds numbers of layers, and they move."""
    extra = {"mlp_only_layers": [1], "num_experts": 3, "num_experts_per_tok": 2}
    extra |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    made("Qwen2Moe", 1, tmp_path / "one", **extra)
    run(
        tmp_path,
        f"""
        merge_method: passthrough
        slices:
          - sources: [{{model: {tmp_path}/one, layer_range: [0, 2]}}]
          - sources: [{{model: {tmp_path}/one, layer_range: [0, 2]}}]
        """,
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["mlp_only_layers"] == [1, 3]
    opened(tmp_path / "out")


def test_head_and_norm_are_of_the_last_slice(tmp_path: Path) -> None:
    """Also if it has no layers, which people do to choose them."""
    for n in range(3):
        checkpoint(tmp_path / str(n), llama(n))
    found = run(
        tmp_path,
        f"""
        merge_method: passthrough
        slices:
          - sources: [{{model: {tmp_path}/0, layer_range: [0, 0]}}]
          - sources: [{{model: {tmp_path}/1, layer_range: [0, 2]}}]
          - sources: [{{model: {tmp_path}/2, layer_range: [2, 2]}}]
        """,
    )
    models = [load(tmp_path / str(n)) for n in range(3)]
    for name, value in found.items():
        whose = 0 if "embed" in name else 1 if ".layers." in name else 2
        assert torch.equal(value, models[whose][name]), name
    assert found.keys() == models[1].keys()


# ------------------------------------------------------------------------- tied and untied heads


def _tied_pair(folder: Path, *, base_tied: bool) -> tuple[Any, Any]:
    one = made("Llama", 1, folder / "base", tie_word_embeddings=base_tied)
    two = made("Llama", 2, folder / "tuned", tie_word_embeddings=not base_tied)
    return one, two


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
@pytest.mark.parametrize("base_tied", [True, False])
def test_tied_and_untied(base_tied: bool, method: str, tmp_path: Path) -> None:
    """Merged is what the two compute with: the head of a tied model is its embedding."""
    base, tuned = _tied_pair(tmp_path, base_tied=base_tied)
    weight = "parameters: {weight: 0.25}" if method != "slerp" else ""
    more = f"  - {{model: {tmp_path}/base, parameters: {{weight: 0.75}}}}"
    if method != "linear":
        more = f"  - {{model: {tmp_path}/base}}\nbase_model: {tmp_path}/base"
    text = f"merge_method: {method}\nmodels:\n  - model: {tmp_path}/tuned\n    {weight}\n{more}\n"
    text += "parameters: {t: 0.25}\n" if method == "slerp" else ""
    run(tmp_path, text)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    reference = type(tuned)(type(tuned.config)(**(SMALL | {"tie_word_embeddings": False})))
    state = {}
    for name, value in tuned.state_dict().items():
        a, b = base.state_dict()[name].double(), value.double()
        state[name] = _slerp(a, b) if method == "slerp" else 0.75 * a + 0.25 * b
    reference.double().load_state_dict(state)
    found = opened(tmp_path / "out").double()
    want = logits(reference.eval())
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert float((logits(found) - want).abs().max()) < 1e-5 * float(want.abs().max())


def _slerp(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    cos = (a * b).sum() / (a.norm() * b.norm())
    if cos > 0.9995:
        return 0.75 * a + 0.25 * b
    theta = cos.acos()
    return ((0.75 * theta).sin() * a + (0.25 * theta).sin() * b) / theta.sin()


def test_redundant_head_of_a_tied_model(tmp_path: Path) -> None:
    """The config says that it is not used: it is neither merged nor written."""
    for n in (1, 2):
        made("Llama", n, tmp_path / str(n), tie_word_embeddings=True)
    tensors = load(tmp_path / "2")
    assert "lm_head.weight" not in tensors
    wrong = torch.full_like(tensors["model.embed_tokens.weight"], 9.0)
    save_file(tensors | {"lm_head.weight": wrong}, tmp_path / "2/model.safetensors")
    text = f"merge_method: linear\nmodels: [model: {tmp_path}/1, model: {tmp_path}/2]\n"
    found = run(tmp_path, text + "parameters: {weight: 1}")
    assert "lm_head.weight" not in found
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    model = opened(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    name = "model.embed_tokens.weight"
    want = (load(tmp_path / "1")[name].double() + tensors[name].double()) / 2
    assert torch.allclose(found[name].double(), want, rtol=1e-6, atol=1e-8)


# --------------------------------------------------------------------------- nothing is left out


def test_experts_keep_the_layout_of_the_inputs(tmp_path: Path) -> None:
    models = {}
    for n in (0, 1, 2):
        tensors = llama(n or None, dtype="float32")
        for layer in range(2):
            for expert in range(3):
                for w in ("w1", "w2", "w3"):
                    path = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight"
                    tensors[path] = random(8, 8, seed=97 * n + expert)
        models[n] = load(checkpoint(tmp_path / str(n), tensors, {"model_type": "mixtral"}))
    found = run(
        tmp_path,
        f"""
        merge_method: task_arithmetic
        base_model: {tmp_path}/0
        models: [model: {tmp_path}/1, model: {tmp_path}/2]
        parameters: {{weight: 0.5}}
        """,
    )
    assert found.keys() == models[0].keys()
    for name, value in found.items():
        want = (models[1][name].double() + models[2][name].double()) / 2
        assert torch.allclose(value.double(), want, atol=1e-6), name


def test_tensors_that_no_list_has(tmp_path: Path) -> None:
    """Biases, norms of q and k, a head for rewards: whatever the files hold is merged."""
    for n in (1, 2):
        tensors = llama(n)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.full((4,), float(n))
        tensors["model.layers.1.self_attn.q_norm.weight"] = torch.full((4,), 2.0 * n)
        tensors["score.weight"] = torch.full((1, 4), 3.0 * n)
        tensors["model.extra"] = torch.full((2, 2, 2, 2), 4.0 * n)
        tensors["model.scalar"] = torch.tensor(5.0 * n)
        tensors["model.empty"] = torch.zeros(0, 4)
        checkpoint(tmp_path / str(n), tensors)
    text = f"merge_method: linear\nmodels: [model: {tmp_path}/1, model: {tmp_path}/2]\n"
    found = run(tmp_path, text + "parameters: {weight: 1}")
    assert found.keys() == load(tmp_path / "1").keys()
    for factor, name in (
        (1, "model.layers.0.self_attn.q_proj.bias"),
        (2, "model.layers.1.self_attn.q_norm.weight"),
        (3, "score.weight"),
        (4, "model.extra"),
        (5, "model.scalar"),
    ):
        assert float(found[name].flatten()[0]) == 1.5 * factor


def test_a_tensor_that_one_model_lacks(tmp_path: Path) -> None:
    checkpoint(tmp_path / "1", llama(1))
    tensors = llama(2)
    del tensors["model.layers.1.input_layernorm.weight"]
    checkpoint(tmp_path / "2", tensors)
    text = f"merge_method: linear\nmodels:\n  - model: {tmp_path}/1\n  - model: {tmp_path}/2\n"
    with pytest.raises(PlanError) as error:
        run(tmp_path, text + "parameters: {weight: 1}")
    assert "2 has no model.layers.1.input_layernorm.weight" in str(error.value)
    assert "models[1], line 4, column 5" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_buffers_that_are_computed(tmp_path: Path) -> None:
    """Checkpoints of 2023 hold `rotary_emb.inv_freq`, and what was tuned from them does not."""
    tensors = llama(1)
    for n in range(2):
        tensors[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    checkpoint(tmp_path / "1", tensors)
    checkpoint(tmp_path / "2", llama(2))
    checkpoint(tmp_path / "3", tensors)
    text = f"merge_method: linear\nmodels: [model: {tmp_path}/1, model: {tmp_path}/%s]\n"
    text += "parameters: {weight: 1}"
    found = run(tmp_path, text % 2)
    assert found.keys() == llama().keys()
    notes = json.loads((tmp_path / "out/weft.json").read_text())["notes"]
    assert [note for note in notes if "rotary_emb.inv_freq" in note and "left out" in note]
    assert run(tmp_path, text % 3, "both").keys() == tensors.keys()


def test_numbers_that_are_no_weights(tmp_path: Path) -> None:
    for n in (1, 2):
        tensors = llama(n)
        tensors["steps"] = torch.tensor([n], dtype=torch.int64)
        tensors["positions"] = torch.arange(7)
        checkpoint(tmp_path / str(n), tensors)
    models = f"models: [model: {tmp_path}/1, model: {tmp_path}/2]\nparameters: {{weight: 1}}\n"
    with pytest.raises(PlanError, match="steps holds int64 and differs"):
        run(tmp_path, f"merge_method: linear\n{models}")
    tensors["steps"] = torch.tensor([1], dtype=torch.int64)
    save_file(tensors, tmp_path / "2/model.safetensors")
    found = run(tmp_path, f"merge_method: linear\n{models}")
    assert torch.equal(found["positions"], torch.arange(7))
    assert torch.equal(found["steps"], torch.tensor([1]))


def test_vocabularies_of_different_sizes(tmp_path: Path) -> None:
    checkpoint(tmp_path / "1", llama(1))
    tensors = llama(2)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()
    checkpoint(tmp_path / "2", tensors, {"vocab_size": VOCABULARY - 1})
    text = f"merge_method: linear\nmodels: [model: {tmp_path}/1, model: {tmp_path}/2]\n"
    with pytest.raises(PlanError) as error:
        run(tmp_path, text + "parameters: {weight: 1}")
    assert "tokenizer: {source: base}" in str(error.value)
    assert ": [40, 48] and [39, 48]" in str(error.value)
