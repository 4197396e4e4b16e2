"""Kinds of adapters: a name, a base, a class of PEFT's and what it is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import wraps
from models import tokens

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Kind:
    """What one folder of the corpus holds.

    Attributes:
        name: Of the folder.
        model: A key of `MODELS`.
        config: Class of PEFT, without `Config`.
        options: For that class.
        before: Changes the base before PEFT wraps it.
        after: Changes the filled model.
        since: The first release that it is made with: an older one takes the options for others,
            or lacks them.
        wrap: In place of `get_peft_model`, where that needs something first.
        adapter: The one that is saved, of a model that has several; else all of them.
        initial: The adapter is saved before training as well, into `initial`.
    """

    name: str
    model: str
    config: str
    options: dict[str, Any]
    before: Callable[[Any], None] | None = None
    after: Callable[[Any], None] | None = None
    since: str = "0"
    wrap: Callable[[Any, Any], Any] | None = None
    adapter: str = ""
    initial: bool = False


def _resize(model: Any) -> None:
    model.resize_token_embeddings(24)
    with torch.no_grad():  # how the new rows are drawn differs between releases
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[20:] = module.weight[:4].flip(0) / 2


def _prune(model: Any) -> None:
    """Half of the ranks go, as they do at the end of AdaLoRA's training."""
    model(tokens()).square().sum().backward()
    for step in (5, 9):  # within the schedule, and at its end
        model.base_model.update_and_allocate(step)


# Two matrices, one of them square: a kind is about its formula, and the corpus is small.
TWO = {"target_modules": ["q_proj", "o_proj"]}
MLP = {"target_modules": ["up_proj", "down_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_proj"]}
CONV = {"target_modules": ["conv1", "conv2", "point", "conv3"]}
FLAT = {"target_modules": ["conv1", "conv2", "point"]}
PLANE = {"target_modules": ["conv2", "point"]}
RANK = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0}  # 0.3 breaks without the last
ADA = {"init_r": 3, "lora_alpha": 5, "total_step": 10, "lora_dropout": 0.1}  # 0.3 breaks with 0
LLAMA = {**RANK, "target_modules": ["q_proj", "down_proj"]}


def _lora(name: str, model: str = "decoder", **options: Any) -> Kind:
    return Kind(name, model, "Lora", {**RANK, **TWO, **options})


def _on_llama(name: str, model: str = "llama", **options: Any) -> Kind:
    before = _resize if "resized" in name else None
    return Kind(name, model, "Lora", {**LLAMA, "task_type": "CAUSAL_LM", **options}, before)


def _init(name: str, since: str, **options: Any) -> Kind:
    """Releases that do not know a name initialise as ever, and write the name."""
    return replace(_lora(f"init-{name}", init_lora_weights=name, **options), since=since)


def _moved(name: str, since: str, wrap: Any = None) -> Kind:
    """These take their factors off the base: what they took is what they were before training."""
    kind = _lora(name, init_lora_weights=name.replace("-", "_"))
    return replace(kind, since=since, wrap=wrap, initial=True)


def _method(name: str, config: str, options: dict[str, Any], model: str = "decoder") -> Kind:
    return Kind(name, model, config, options)


def _refused(name: str, config: str, wrap: Any = None, **options: Any) -> Kind:
    """What has no merged weight: the newest release's file is enough."""
    adapter = "default" if wrap else ""
    options["task_type"] = "CAUSAL_LM"
    return Kind(name, "llama", config, options, since="0.21", wrap=wrap, adapter=adapter)


LORA = [
    _lora("lora"),
    _lora("lora-regex", target_modules=r"model\.layers\.1\..*(v_proj|up_proj)"),
    _lora("lora-layers", layers_to_transform=[1], layers_pattern="layers"),
    _lora("lora-excluded", exclude_modules=["layers.0.self_attn.q_proj"]),
    _lora("rslora", use_rslora=True, r=3),
    _lora("patterns", rank_pattern={"o_proj": 3}, alpha_pattern={"layers.1.self_attn.q_proj": 5}),
    _lora("dora", use_dora=True),
    _lora("dora-rslora", use_dora=True, use_rslora=True),
    _lora("lora-embedding", target_modules=["embed_tokens", "o_proj"]),
    _lora("dora-embedding", target_modules=["embed_tokens"], use_dora=True),
    _lora("lora-head", target_modules=["lm_head"]),
    _lora("lora-with-bias", lora_bias=True, **MLP),
    *(_lora(f"bias-{b}", bias=b.replace("-", "_"), **MLP) for b in ("all", "lora-only")),
    _lora("norm-saved", modules_to_save=["norm"]),
    _lora("head-saved", modules_to_save=["lm_head"]),
    _lora("embedding-saved", modules_to_save=["embed_tokens"]),
    _lora("tokens-beside", trainable_token_indices=[3, 17, 5]),
    _lora("tokens-of-module", trainable_token_indices={"embed_tokens": [0, 19]}),
    _init("gaussian", "0.7"),
    _init("orthogonal", "0.16"),
    _init("pissa", "0.11"),
    _init("olora", "0.12"),
    _init("mica", "0.21"),
    _moved("pissa", "0.18"),
    _moved("olora", "0.18"),
    _moved("corda", "0.18", wraps.corda),
    _moved("lora-ga", "0.19", wraps.lora_ga),
    _init("loftq", "0.7", loftq_config={"loftq_bits": 4, "loftq_iter": 1}),
    _lora("kasa", kasa_config={"beta": 1e-4, "gamma": 1e-3}),
    _lora("bdlora", use_bdlora={"target_modules_bd_a": ["q_proj"], "nblocks": 2,
                                "target_modules_bd_b": ["o_proj"]}),
    _lora("qalora", use_qalora=True, qalora_group_size=4),
    replace(_lora("qalora-pooled", use_qalora=True, qalora_group_size=8), since="0.19",
            wrap=wraps.qalora),
    replace(_lora("arrow"), since="0.18", wrap=wraps.arrow, adapter="arrow_router"),
    _lora("monteclora", monteclora_config={"num_samples": 4}),
    _lora("velora", velora_config={"num_groups": 4}),
    *(
        _lora(f"gpt2-{name}", "gpt2", **GPT2, fan_in_fan_out=True, **options)
        for name, options in (
            ("lora", {}),
            ("dora", {"use_dora": True}),
            ("rslora", {"use_rslora": True}),
            ("bias-all", {"bias": "all"}),
        )
    ),
    # q and v out of the fused q, k, v: PEFT before 0.3
    _lora("gpt2-parts", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True,
          enable_lora=[True, False, True]),
    # PEFT corrects the option for each module, and saves that of the module which it saw last.
    _lora("gpt2-mixed", "gpt2", target_modules=["c_attn", "c_proj", "lm_head"]),
    _lora("gpt2-embedding", "gpt2", target_modules=["wte"]),
    _lora("conv-lora", "conv", **CONV),
    _lora("conv-lora-flat", "conv", **PLANE),
    _lora("conv-dora", "conv", **CONV, use_dora=True),
    _lora("conv-dora-flat", "conv", **PLANE, use_dora=True),
    _lora("mha-lora", "mha", target_modules=["mha"]),
    *(
        _lora(f"{model}-lora", model, target_modules=[],
              target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        for model in ("experts", "experts-transposed")
    ),
    _lora("experts-down-lora", "experts", target_modules=[],
          target_parameters=["experts.down_proj"], use_rslora=True),
    _on_llama("llama-lora"),
    _on_llama("llama-all-linear", target_modules="all-linear"),
    _on_llama("llama-dora", use_dora=True),
    _on_llama("llama-embedding", target_modules=["embed_tokens", "q_proj"]),
    _on_llama("llama-ends", target_modules=["embed_tokens", "lm_head"]),
    _on_llama("llama-ends-saved", modules_to_save=["embed_tokens", "lm_head"]),
    _on_llama("llama-norms-saved", modules_to_save=["norm"]),
    _on_llama("llama-resized"),
    _on_llama("llama-resized-embedding", target_modules=["embed_tokens", "q_proj"]),
    _on_llama("llama-replicated", layer_replication=[[0, 2], [1, 2]]),
    _on_llama("llama-alora", alora_invocation_tokens=[14, 1]),
    _on_llama("tied-lora", "llama-tied"),
    _on_llama("tied-embedding", "llama-tied", target_modules=["embed_tokens", "q_proj"]),
    _on_llama("tied-embedding-saved", "llama-tied", modules_to_save=["embed_tokens"]),
    _on_llama("tied-tokens", "llama-tied", trainable_token_indices=[3, 17]),
    _on_llama("tied-together", "llama-tied", target_modules=["embed_tokens", "q_proj"],
              ensure_weight_tying=True),
    _on_llama("tied-resized", "llama-tied"),
]  # fmt: skip

FACTORS = [
    _method("loha", "LoHa", {"r": 2, "alpha": 3, **TWO}),
    _method("loha-patterns", "LoHa", {"r": 2, "alpha": 3, "rank_pattern": {"o_proj": 3},
                                      "alpha_pattern": {"o_proj": 5}, **TWO}),
    _method("conv-loha", "LoHa", {"r": 2, "alpha": 3, **PLANE}, "conv"),
    _method("conv-loha-1d", "LoHa", {"r": 2, "alpha": 3, **FLAT}, "conv"),
    _method("conv-loha-effective", "LoHa", {"r": 2, "alpha": 3, "use_effective_conv2d": True,
                                            **PLANE}, "conv"),
    _method("lokr", "LoKr", {"r": 2, "alpha": 3, **TWO}),
    _method("lokr-both", "LoKr", {"r": 1, "alpha": 3, "decompose_both": True, **TWO}),
    _method("lokr-factor", "LoKr", {"r": 2, "alpha": 3, "decompose_factor": 8, **TWO}),
    _method("conv-lokr", "LoKr", {"r": 2, "alpha": 3, **PLANE}, "conv"),
    _method("conv-lokr-1d", "LoKr", {"r": 2, "alpha": 3, **FLAT}, "conv"),
    _method("conv-lokr-effective", "LoKr", {"r": 1, "alpha": 3, "use_effective_conv2d": True,
                                            **PLANE}, "conv"),
    _method("adalora", "AdaLora", {**ADA, **TWO}),
    Kind("adalora-pruned", "decoder", "AdaLora",
         {**ADA, "init_r": 4, "target_r": 2, "tfinal": 1, **TWO},
         after=_prune),
    _method("gpt2-adalora", "AdaLora", {**ADA, "fan_in_fan_out": True, **GPT2}, "gpt2"),
    _method("vera", "Vera", {"r": 4, **TWO}),
    _method("vera-drawn", "Vera", {"r": 4, "save_projection": False, "projection_prng_key": 3,
                                   **TWO}),
    _method("gpt2-vera", "Vera", {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn"]},
            "gpt2"),
    _method("pvera", "Pvera", {"r": 4, **TWO}),
    _method("vblora", "VBLoRA", {"r": 2, "num_vectors": 6, "vector_length": 8, **TWO}),
    _method("vblora-topk", "VBLoRA", {"r": 2, "num_vectors": 6, "vector_length": 8,
                                      "save_only_topk_weights": True, **TWO}),
    _method("randlora", "RandLora", {"r": 8, **TWO}),
    _method("randlora-drawn", "RandLora", {"r": 8, "save_projection": False, **TWO}),
    _method("randlora-sparse", "RandLora", {"r": 8, "sparse": True, "save_projection": False,
                                            **TWO}),
    _method("hira", "Hira", {"r": 2, **TWO}),
    _method("conv-hira", "Hira", {"r": 2, **CONV}, "conv"),
    _method("gralora", "Gralora", {"r": 4, "alpha": 6, "gralora_k": 2, **TWO}),
    _method("gralora-hybrid", "Gralora", {"r": 4, "alpha": 6, "hybrid_r": 2, **TWO}),
    _method("delora", "Delora", {"r": 2, "delora_lambda": 3, **TWO}),
    _method("miss", "Miss", {"r": 4, **TWO}),
    _method("miss-bat", "Miss", {"r": 4, "init_weights": "bat", **TWO}),
    _method("miss-mini", "Miss", {"r": 4, "mini_r": 2, "init_weights": "mini", **TWO}),
    _method("bone", "Bone", {"r": 4, **TWO}),
    _method("bone-bat", "Bone", {"r": 4, "init_weights": "bat", **TWO}),
    _method("adamss", "Adamss", {"r": 4, "num_subspaces": 2, **TWO}),
    _method("tinylora", "TinyLora", {"r": 2, "u": 4, **TWO}),
    _method("tinylora-drawn", "TinyLora", {"r": 2, "u": 4, "save_projection": False, **TWO}),
    _method("unilora", "UniLora", {"r": 2, "theta_d_length": 32, **TWO}),
    _method("unilora-indices", "UniLora", {"r": 2, "theta_d_length": 32, "save_indices": True,
                                           **TWO}),
    _method("lily", "Lily", {"r": 2, **TWO}),
]  # fmt: skip

SCALES = [
    _method("ia3", "IA3", {"target_modules": ["v_proj", "o_proj", "down_proj"],
                           "feedforward_modules": ["down_proj"]}),
    _method("gpt2-ia3", "IA3", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True,
                                "feedforward_modules": ["c_proj"]}, "gpt2"),
    _method("conv-ia3", "IA3", {**PLANE, "feedforward_modules": ["point"]}, "conv"),
    _method("ln-tuning", "LNTuning", {"target_modules": ["input_layernorm", "norm"]}),
    _method("beft", "Beft", {"target_modules": ["v_proj", "down_proj"]}),
    _method("tokens", "TrainableTokens", {"token_indices": [3, 17, 5],
                                          "target_modules": ["embed_tokens"]}),
    _method("tied-tokens-alone", "TrainableTokens", {"token_indices": [3, 17],
                                                     "target_modules": ["embed_tokens"]},
            "llama-tied"),
    *(_method(f"road-{n}", "Road", {"variant": f"road_{n}", "group_size": 8, **TWO})
      for n in (1, 2, 4)),
    *(_method(f"glora-{a}-{c}-{d}", "Glora", {"r": 2, "config_A_B": a, "config_C": c,
                                              "config_D_E": d, **MLP})
      for a, c, d in (("lora", "lora", "constant"), ("vector", "vector", "vector"),
                      ("constant", "none", "none"))),
]  # fmt: skip

ROTATIONS = [
    # `r` blocks and `oft_block_size` changed their meaning and their layout more than once.
    _method("oft-blocks", "OFT", {"r": 4, "oft_block_size": 0, **TWO}),
    _method("oft-old", "OFT", {"r": 4, **TWO}),
    _method("oft-size", "OFT", {"r": 0, "oft_block_size": 4, **TWO}),
    _method("oft-exact", "OFT", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False, **TWO}),
    _method("oft-coft", "OFT", {"r": 0, "oft_block_size": 4, "coft": True, "eps": 0.01, **TWO}),
    _method("oft-shared", "OFT", {"r": 0, "oft_block_size": 4, "block_share": True, **TWO}),
    _method("oft-old-coft", "OFT", {"r": 4, "coft": True, "eps": 0.01, **TWO}),
    _method("oft-old-shared", "OFT", {"r": 4, "block_share": True, **TWO}),
    _method("gpt2-oft", "OFT", {"r": 0, "oft_block_size": 4, "fan_in_fan_out": True, **GPT2},
            "gpt2"),
    _method("conv-oft", "OFT", {"r": 0, "oft_block_size": 4, "target_modules": ["conv2"]}, "conv"),
    _method("conv-oft-old", "OFT", {"r": 4, "target_modules": ["conv2"]}, "conv"),
    _method("boft", "BOFT", {"boft_block_size": 4, **TWO}),
    _method("boft-butterfly", "BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2, **TWO}),
    _method("boft-bias", "BOFT", {"boft_block_size": 4, "bias": "boft_only", **MLP}),
    _method("conv-boft", "BOFT", {"boft_block_size": 4, "target_modules": ["point"]}, "conv"),
    _method("hra", "HRA", {"r": 4, **TWO}),
    _method("hra-orthogonal", "HRA", {"r": 4, "apply_GS": True, **TWO}),
    _method("conv-hra", "HRA", {"r": 4, **PLANE}, "conv"),
    _method("psoft", "Psoft", {"r": 4, "psoft_alpha": 4, **TWO}),
]  # fmt: skip

SPECTRA = [
    _method("fourierft", "FourierFT", {"n_frequency": 20, "scaling": 20.0, **TWO}),
    _method("gpt2-fourierft", "FourierFT", {"n_frequency": 20, "scaling": 20.0,
                                            "fan_in_fan_out": True, **GPT2}, "gpt2"),
    _method("waveft", "WaveFT", {"n_frequency": 20, "scaling": 2.0, **TWO}),
    _method("waveft-db4", "WaveFT", {"n_frequency": 20, "scaling": 2.0,
                                      "wavelet_family": "db4", **TWO}),
    _method("c3a", "C3A", {"block_size": 8, **TWO}),
    _method("shira", "Shira", {"r": 2, "random_seed": 4, **TWO}),
]  # fmt: skip

OTHERS = [
    _method("peanut", "Peanut", {"r": 2, **TWO}),
    _method("deft", "Deft", {"r": 2, **TWO}),
    _method("deft-para", "Deft", {"r": 2, "para": True, **TWO}),
    _method("frod", "Frod", {"sparse_rate": 0.1, **TWO}),
    _method("supertuning", "Supertuning", {"sparsity": 0.9, **TWO}),
    _method("osf", "OSF", {"effective_rank": 4, **TWO}),
    _method("prompt-tuning", "PromptTuning", {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"},
            "llama"),
    _method("prefix-tuning", "PrefixTuning", {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"},
            "llama"),
    _refused("p-tuning", "PromptEncoder", num_virtual_tokens=2, encoder_hidden_size=4),
    _refused("cpt", "CPT", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
    _refused("adaption-prompt", "AdaptionPrompt", adapter_len=2, adapter_layers=1),
    _refused("cartridge", "Cartridge", num_virtual_tokens=2),
    _refused("shadow", "Shadow", r=2, shadow_hidden_size=4, shadow_intermediate_size=4),
    _refused("xlora", "XLora", wraps.xlora, hidden_size=16, xlora_depth=3, xlora_size=4),
]  # fmt: skip

KINDS = {
    kind.name: kind
    for kind in [*LORA, *FACTORS, *SCALES, *ROTATIONS, *SPECTRA, *OTHERS]
}  # fmt: skip
