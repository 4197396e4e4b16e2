"""The rows of the table in `docs/reference/adapters.md`, and the scene that each of them is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import peft
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from tests.oracle import methods, test_peft_form
from tests.oracle import other_scenes as other
from tests.oracle import test_all_methods as all_methods
from tests.oracle.scenes import (
    attention,
    changed,
    disturbed,
    edited,
    experts,
    llama,
    lora,
    moved,
    of_kind,
    of_old_attention,
    of_one_process,
    on_another_base,
    other_tool,
    poisoned,
    silenced,
    toy,
    trained_in_full,
    two_patterns,
    without,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.oracle.scenes import Scene

_KEYS = {
    "adapter-name": "`lora_A.default.weight`",
    "another-name": "`lora_A.my_run.weight`",
    "twice-named": "`lora_A.default.default.weight`",
    "no-prefix": "no `base_model.model.`",
    "doubled-prefix": "`base_model.model.` twice",
    "model-missing": "`layers.0…` for `model.layers.0…`",
    "model-doubled": "`model.model.layers.0…`",
    "language-model": "`model.language_model.layers.0…`",
    "old-vision-language": "`language_model.model.layers.0…`",
    "torch-compile": "`_orig_mod.`",
    "torch-compile-in-front": "`_orig_mod.` before all",
    "data-parallel": "`module.` before all",
    "data-parallel-inside": "`module.`",
    "fsdp": "`_fsdp_wrapped_module.`",
    "checkpointing": "`_checkpoint_wrapped_module.`",
    "base-layer": "`base_layer.lora_A.weight`",
    "no-weight": "`lora_A` without `.weight`",
    "lora-down-up": "`lora_down`, `lora_up`",
}
_LANGUAGE = {"task_type": "CAUSAL_LM"}
_NOT_MERGED: dict[str, Callable[[], Any]] = {
    "prompt tuning": partial(peft.PromptTuningConfig, num_virtual_tokens=3, **_LANGUAGE),
    "prefix tuning": partial(peft.PrefixTuningConfig, num_virtual_tokens=3, **_LANGUAGE),
    "P-tuning": partial(peft.PromptEncoderConfig, num_virtual_tokens=3, **_LANGUAGE),
    "multitask prompt tuning": partial(
        peft.MultitaskPromptTuningConfig, num_virtual_tokens=3, num_tasks=1, **_LANGUAGE
    ),
    "CPT": partial(
        peft.CPTConfig,
        cpt_token_ids=[1, 2],
        cpt_mask=[1, 1],
        cpt_tokens_type_mask=[1, 2],
        **_LANGUAGE,
    ),
    "adaption prompts": partial(
        peft.AdaptionPromptConfig, adapter_len=3, adapter_layers=2, **_LANGUAGE
    ),
    "Cartridge": partial(peft.CartridgeConfig, num_virtual_tokens=3, **_LANGUAGE),
    "Lily": partial(peft.LilyConfig, target_modules=["q_proj"], **_LANGUAGE),
    "Poly": partial(peft.PolyConfig, target_modules=["q_proj"], r=4, **_LANGUAGE),
    "ShadowPEFT": partial(peft.ShadowConfig, **_LANGUAGE),
    "aLoRA": partial(
        peft.LoraConfig, target_modules=["q_proj"], alora_invocation_tokens=[3], **_LANGUAGE
    ),
}


ROWS: dict[str, Callable[[Path], Scene]] = {
    "LoRA on Linear": lora,
    "LoRA on Conv1D of GPT-2": partial(lora, model=methods.Turned, target_modules=["c_fc"]),
    "LoRA on Conv1d": partial(other.convolutions, layers=["one", "strided"]),
    "LoRA on Conv2d": partial(lora, target_modules=["conv2", "linear"]),
    "LoRA on Conv3d": partial(other.convolutions, layers=["three"]),
    "LoRA on a convolution with groups": other.grouped,
    "LoRA on Embedding": partial(lora, target_modules=["embed"]),
    "LoRA on nn.MultiheadAttention": attention,
    "LoRA on fused experts": experts,
    "LoRA on fused experts, stored one by one": partial(other.fused, form="hub"),
    "LoRA on fused experts of gpt-oss": partial(other.fused, model="gpt-oss"),
    "LoRA on fused experts, PEFT 0.17": partial(
        other.of_release, kind="experts-lora", release="0.17.1"
    ),
    "LoRA on fused experts, Unsloth's `grouped_by_expert`": other.grouped_by_expert,
    "LoRA on single experts, base fused": other.single,
    "LoRA on single experts, base fused, rsLoRA": partial(other.single, use_rslora=True),
    "LoRA on single experts, stored one by one, rsLoRA": partial(
        other.single, form="hub", use_rslora=True
    ),
    "LoRA on parts of a fused matrix, PEFT 0.2": of_old_attention,
    "rsLoRA": partial(lora, use_rslora=True),
    "`rank_pattern`, `alpha_pattern`": partial(
        lora, rank_pattern={"square": 2}, alpha_pattern={"head": 5}
    ),
    "DoRA": partial(lora, use_dora=True),
    "KaSA": partial(lora, kasa_config=KasaConfig()),
    "BD-LoRA": partial(
        lora,
        target_modules=["linear", "square"],
        use_bdlora=BdLoraConfig(
            target_modules_bd_a=["linear"], target_modules_bd_b=["square"], nblocks=2
        ),
    ),
    "QA-LoRA": other.pooled,
    "MonteCLoRA": partial(
        lora, target_modules=["linear", "square"], monteclora_config=MontecloraConfig()
    ),
    "VeLoRA": partial(
        lora, target_modules=["linear", "square"], velora_config=VeloraConfig(num_groups=2)
    ),
    "MiCA": partial(lora, init_lora_weights="mica"),
    "`lora_bias`": partial(lora, target_modules=["linear", "head"], lora_bias=True),
    '`bias="all"`': partial(lora, bias="all"),
    '`bias="lora_only"`': partial(lora, bias="lora_only"),
    "biases of PEFT before 0.7": partial(other.of_release, kind="bias-all", release="0.3.0"),
    "biases that PEFT 0.7 to 0.20 did not save": partial(
        other.of_release, kind="bias-lora-only", release="0.13.2"
    ),
    "`modules_to_save`": trained_in_full,
    "`modules_to_save` that caught more than it names": partial(
        other.of_release, kind="llama-norms-saved", release="0.21.2"
    ),
    "`trainable_token_indices`": partial(llama, trainable_token_indices=[90, 3]),
    "LoRA on a tied embedding": partial(
        llama, model="llama-tied", target_modules=["embed_tokens", "o_proj"]
    ),
    "`ensure_weight_tying`": partial(
        llama,
        model="llama-tied",
        target_modules=["embed_tokens", "o_proj"],
        ensure_weight_tying=True,
    ),
    "a tied embedding in `modules_to_save`": partial(
        llama, model="llama-tied", modules_to_save=["embed_tokens"]
    ),
    "the same, PEFT 0.2": partial(other.of_release, kind="tied-embedding-saved", release="0.2.0"),
    "the same, PEFT 0.3 to 0.5": partial(
        other.of_release, kind="tied-embedding-saved", release="0.5.0"
    ),
    "a resized vocabulary": partial(llama, rows=121),
    "`layer_replication`": partial(llama, layer_replication=[[0, 2], [1, 2], [0, 1]]),
    "PiSSA with `--init-adapter`": partial(moved, init="pissa"),
    "OLoRA with `--init-adapter`": partial(moved, init="olora"),
    "CorDA with `--init-adapter`": partial(moved, init="corda"),
    "LoRA-GA with `--init-adapter`": partial(moved, init="lora_ga"),
    "PiSSA on the base that it left": partial(other.on_what_was_left, init="pissa"),
    "PiSSA without `--init-adapter`": partial(moved, init="pissa", given=None),
    "OLoRA without `--init-adapter`": partial(moved, init="olora", given=None),
    "CorDA without `--init-adapter`": partial(moved, init="corda", given=None),
    "LoRA-GA without `--init-adapter`": partial(moved, init="lora_ga", given=None),
    "LoftQ on the base that it left": other.loftq,
    "LoftQ without `--init-adapter`": partial(
        other.of_release, kind="init-loftq", release="0.10.0"
    ),
    **{
        f"`{name}`": partial(toy, config, model=model)
        for name, (config, model) in all_methods.METHODS.items()
        if " " not in name
    },
    "`BONE`": partial(other.of_release, kind="bone", release="0.18.1"),
    "`LOKR` of PEFT before 0.14": partial(other.of_release, kind="lokr", release="0.13.2"),
    "`OFT` of PEFT 0.16 and 0.17": partial(other.of_release, kind="oft-size", release="0.17.1"),
    "`OFT` of PEFT before 0.14": partial(other.of_release, kind="oft-old", release="0.13.2"),
    "`OFT` on a convolution with a kernel above 1": partial(
        other.of_release, kind="conv-oft", release="0.21.2"
    ),
    "`UNILORA` without its indices": partial(other.of_release, kind="unilora", release="0.21.2"),
    "`TINYLORA` without its projections": partial(
        other.of_release, kind="tinylora-drawn", release="0.21.2"
    ),
    "mlx-lm": partial(other_tool, make=test_peft_form.mlx),
    "torchtune": partial(other_tool, make=test_peft_form.torchtune),
    "Kohya, LyCORIS": partial(other_tool, make=test_peft_form.kohya),
    **{name: partial(of_kind, config=config) for name, config in _NOT_MERGED.items()},
    "X-LoRA": other.x_lora,
    "Arrow": partial(edited, make=llama, arrow_config={"top_k": 2}),
    "Megatron layers": partial(edited, make=llama, megatron_config={"hidden_size": 64}),
    "a `use_…` flag that is not known": partial(edited, make=llama, use_newlora=True),
    "a `…_config` that is not known": partial(edited, make=llama, newlora_config={"a": 1}),
    "an `init_lora_weights` that is not known": partial(
        edited, make=llama, init_lora_weights="brand_new"
    ),
    "a `peft_type` that is not known": partial(edited, make=llama, peft_type="BRAND_NEW"),
    "AdaMSS": partial(other.of_release, kind="adamss", release="0.21.2"),
    "PSOFT": partial(
        toy, partial(peft.PsoftConfig, r=4, target_modules=["linear"]), model=methods.Toy
    ),
    **{row: partial(disturbed, name=name) for name, row in _KEYS.items()},
    **{
        f"{name}, names {when} transformers 4.52": partial(
            other.vision, model=name.lower(), rename=rename
        )
        for name, old in other.BEFORE.items()
        for when, rename in (("before", old), ("since", None))
    },
    "`lora_B` lost": partial(changed, change=without("layers.0.self_attn.q_proj.lora_B.weight")),
    "a module lost": partial(
        changed,
        change=lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q_proj." not in k},
        known=False,
    ),
    "a factor twice": partial(
        changed,
        change=lambda t: (
            t | {k.replace(".weight", ".default.weight"): v.clone() for k, v in t.items()}
        ),
    ),
    "two adapters in one file": partial(
        changed,
        change=lambda t: {
            k.replace(".weight", f".{name}.weight"): v.clone()
            for k, v in t.items()
            for name in ("one", "two")
        },
    ),
    "another rank in the config": partial(edited, make=llama, r=5),
    "no `lora_alpha`": partial(edited, make=llama, lora_alpha=None),
    "two `alpha_pattern` entries that match one module": two_patterns,
    "another base": on_another_base,
    "a base of fewer layers": partial(on_another_base, num_hidden_layers=1),
    "a base of another vocabulary": partial(
        on_another_base, of=partial(llama, target_modules=["embed_tokens"]), vocab_size=90
    ),
    "NaN in a factor": partial(changed, change=poisoned),
    "`lora_B` zero everywhere": partial(changed, change=silenced, known=False),
    "one process's shards of `lora_B`": partial(changed, change=of_one_process),
    "empty tensors, of ZeRO-3": partial(changed, change=other.emptied),
    "flat tensors, of FSDP": partial(changed, change=other.flattened),
    "magnitudes without `use_dora`": partial(
        edited, make=partial(llama, use_dora=True), use_dora=False
    ),
    "`use_dora` without magnitudes": partial(edited, make=llama, use_dora=True),
    "`modules_to_save` lost": partial(
        changed, change=without("lm_head.weight"), make=trained_in_full
    ),
    "token rows lost": partial(edited, make=llama, trainable_token_indices=[3]),
    "modules that `target_modules` does not name": partial(
        edited, make=llama, target_modules=["q_proj"]
    ),
    **{
        f"a base quantised by {kind}": partial(other.quantised, kind=kind)
        for kind in other.QUANTISED
    },
}
