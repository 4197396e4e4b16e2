"""How a base is wrapped where `get_peft_model` alone does not do it: (base, config) -> model.

PEFT's parts are imported late: releases that lack them import this, too, and the kind is absent
of their archives.
"""

from __future__ import annotations

from typing import Any

from models import tokens


def corda(model: Any, config: Any) -> Any:
    """CorDA decomposes W by the covariance of its inputs, which it takes from a few of them."""
    from peft import get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config.corda_config = CordaConfig(corda_method="kpm")
    rows = tokens()
    preprocess_corda(model, config, run_model=lambda: [model(rows[n : n + 1]) for n in range(2)])
    return get_peft_model(model, config)


def lora_ga(model: Any, config: Any) -> Any:
    """LoRA-GA takes its factors from an SVD of the gradient of W."""
    from peft import get_peft_model
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config.lora_ga_config = LoraGAConfig(direction="ArB2r", scale="stable")
    preprocess_loraga(model, config, lambda: model(tokens()).square().sum().backward())
    return get_peft_model(model, config)


def arrow(model: Any, _: Any) -> Any:
    """Arrow routes tokens between adapters that are there: two of this release's, of one rank."""
    from peft import ArrowConfig, __version__, create_arrow_model

    tasks = [f"{__version__}/{kind}" for kind in ("lora", "init-gaussian")]
    return create_arrow_model(model, tasks, ArrowConfig(top_k=2))


def qalora(model: Any, config: Any) -> Any:
    """PEFT has QA-LoRA for layers of GPTQ alone; here its forward pass is put on plain ones."""
    from peft import get_peft_model
    from peft.tuners.lora.variants import QALoraLinearVariant

    wrapped = get_peft_model(model, config)
    for layer in [m for m in wrapped.modules() if hasattr(m, "lora_variant")]:
        QALoraLinearVariant.init(layer, "default", config)
        layer.lora_variant["default"] = QALoraLinearVariant()
    return wrapped


def xlora(model: Any, config: Any) -> Any:
    """X-LoRA mixes adapters that are there, by their numbers."""
    from peft import __version__, get_peft_model

    model.config.use_cache = False
    config.adapters = {"0": f"{__version__}/llama-lora", "1": f"{__version__}/llama-lora"}
    return get_peft_model(model, config)
