"""Recipes whose outcome is compared with MergeKit's; models are named as `parity_models` does."""

from __future__ import annotations

# arcee_fusion is below: the last bit of a score decides on which side of its threshold an element
# falls.
METHODS = {
    "linear": ("", "weight: 0.7", "weight: 0.4"),
    "linear_raw": ("normalize: false", "weight: 0.7", "weight: -0.2"),
    "task_arithmetic": ("lambda: 0.8", "weight: 0.7", "weight: 0.4"),
    "ties": ("", "weight: 0.7, density: 0.4", "weight: 0.4, density: 0.6"),
    "ties_raw": (
        "normalize: false, lambda: 1.1, rescale: true",
        "weight: 1, density: 0.2",
        "weight: 0.5",
    ),
    "breadcrumbs": ("", "weight: 0.7, density: 0.6, gamma: 0.05", "weight: 0.4, density: 0.9"),
    "breadcrumbs_ties": ("", "weight: 0.7, density: 0.6", "weight: 0.4, density: 0.9, gamma: 0.1"),
    "sce": ("select_topk: 0.4", "", ""),
    "model_stock": ("", "", ""),
    "model_stock_rows": ("filter_wise: true", "", ""),
    "nuslerp": ("", "weight: 0.7", "weight: 0.4"),
    "nuslerp_rows": ("nuslerp_flatten: false", "weight: 0.7", "weight: 0.4"),
    "nuslerp_columns": (
        "nuslerp_flatten: false, nuslerp_row_wise: true",
        "weight: 0.7",
        "weight: 0.4",
    ),
    "multislerp": ("", "weight: 0.7", "weight: 0.4"),
    "karcher": ("", "", ""),
    "ram": ("epsilon: 0.008", "", ""),
    "ramplus_tl": ("epsilon: 0.008", "", ""),
    "nearswap": ("t: 0.004", "", None),
    "slerp": ("t: 0.3", "", None),
}
_BASELESS = ("linear", "linear_raw", "karcher")
_NAMES = {"linear_raw": "linear", "ties_raw": "ties", "model_stock_rows": "model_stock"}
_NAMES |= {"nuslerp_rows": "nuslerp", "nuslerp_columns": "nuslerp"}


def of_method(case: str, kind: str) -> str:
    """A recipe of one method on one kind of model."""
    shared, *each = METHODS[case]
    lines = [f"merge_method: {_NAMES.get(case, case)}", "dtype: float32", "models:"]
    for letter, own in zip("ab", each, strict=True):
        if own is not None:
            lines += [f"  - model: {kind}-{letter}", f"    parameters: {{{own}}}"]
    if case in ("nearswap", "slerp"):
        lines.append(f"  - model: {kind}-base")
    if case not in _BASELESS:
        lines.append(f"base_model: {kind}-base")
    return "\n".join([*lines, f"parameters: {{{shared}}}", ""])


GRADIENTS = """
merge_method: ties
dtype: float32
base_model: llama-base
models:
  - model: llama-a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: llama-b
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - filter: self_attn
          value: [0.1, 0.9]
        - value: 0
parameters:
  normalize: true
  int8_mask: true
"""
SLERP = """
slices:
  - sources:
      - model: llama-a
        layer_range: [0, 3]
      - model: llama-b
        layer_range: [0, 3]
merge_method: slerp
base_model: llama-a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
"""
STACKED = """
slices:
  - sources:
    - model: llama-a
      layer_range: [0, 2]
  - sources:
    - model: llama-deep
      layer_range: [1, 5]
  - sources:
    - model: llama-b
      layer_range: [3, 3]
merge_method: passthrough
dtype: float32
"""
SCALED = """
slices:
  - sources:
    - model: llama-a
      layer_range: [0, 2]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: [0.5, 2]
          - value: 1.0
  - sources:
    - model: llama-a
      layer_range: [1, 3]
merge_method: passthrough
dtype: float32
"""
SLICED_TIES = """
slices:
  - sources:
      - model: llama-a
        layer_range: [0, 1]
        parameters: {weight: [0.2, 0.9], density: 0.5}
      - model: llama-deep
        layer_range: [4, 5]
        parameters: {weight: 0.5, density: 0.5}
      - model: llama-base
        layer_range: [0, 1]
    parameters: {lambda: 0.5}
  - sources:
      - model: llama-base
        layer_range: [1, 3]
      - model: llama-b
        layer_range: [1, 3]
        parameters: {weight: [0.2, 0.9], density: 0.5}
merge_method: ties
base_model: llama-base
parameters: {lambda: [2, 3]}
dtype: float32
"""
MODULES = """
modules:
  text_decoder:
    slices:
      - sources:
          - model: gemma3vl-a
            layer_range: [0, 2]
          - model: gemma3vl-b
            layer_range: [0, 2]
        parameters: {t: [0, 1]}
      - sources:
          - model: gemma3vl-a
            layer_range: [2, 3]
          - model: gemma3vl-b
            layer_range: [2, 3]
  vision_tower:
    models:
      - model: gemma3vl-a
      - model: gemma3vl-b
    parameters: {t: 0.25}
  multi_modal_projector:
    models:
      - model: gemma3vl-a
      - model: gemma3vl-b
merge_method: slerp
base_model: gemma3vl-a
parameters: {t: 0.75}
dtype: float32
"""
PRECEDENCE = """
slices:
  - sources:
      - model: llama-a
        layer_range: [0, 3]
        parameters: {weight: [{filter: q_proj, value: 0.9}]}
      - model: llama-b
        layer_range: [0, 3]
    parameters:
      weight: [{filter: k_proj, value: [0.1, 0.8]}, {filter: "layers.1.", value: 0.3}]
merge_method: linear
parameters: {weight: 0.5, normalize: [{filter: up_proj, value: false}]}
dtype: float32
"""
ONE_TIED = """
merge_method: linear
models:
  - {model: llama-tied-a, parameters: {weight: 1}}
  - {model: llama-tied-b, parameters: {weight: 2}}
dtype: float32
"""

# The first slice has a base of its own; the second one takes that of the recipe.
SLICE_BASE = """
merge_method: ties
base_model: llama-b
slices:
  - base_model: llama-base
    sources:
      - {model: llama-base, layer_range: [0, 2]}
      - {model: llama-a, layer_range: [0, 2], parameters: {weight: 0.7, density: 0.4}}
      - {model: llama-b, layer_range: [0, 2], parameters: {weight: 0.4, density: 0.6}}
  - sources:
      - {model: llama-a, layer_range: [2, 3], parameters: {weight: 0.6, density: 0.5}}
      - {model: llama-b, layer_range: [2, 3]}
      - {model: llama-deep, layer_range: [4, 5], parameters: {weight: 0.3, density: 0.5}}
dtype: float32
"""

SEVERAL = """
name: left
merge_method: ties
base_model: llama-base
models:
  - {model: llama-a, parameters: {weight: 0.7, density: 0.4}}
  - {model: llama-b, parameters: {weight: 0.4, density: 0.6}}
dtype: float32
---
merge_method: slerp
base_model: left
models: [model: left, model: mixed]
parameters: {t: [0.2, 0.7]}
dtype: float32
---
name: mixed
merge_method: linear
models:
  - {model: left, parameters: {weight: 1}}
  - {model: llama-c, parameters: {weight: 3}}
dtype: float32
"""

MORE_IN_THE_LAST = """
merge_method: linear
slices:
  - sources:
      - {model: llama-a, layer_range: [0, 2], parameters: {weight: 1}}
  - sources:
      - {model: llama-b, layer_range: [2, 3], parameters: {weight: 1}}
      - {model: llama-c, layer_range: [2, 3], parameters: {weight: 3}}
dtype: float32
"""

FUSION = """
merge_method: arcee_fusion
dtype: float32
base_model: {kind}-base
models: [model: {kind}-a]
"""
ADAPTER_ON_BFLOAT16 = """
merge_method: task_arithmetic
base_model: llama-half-base
models:
  - {model: llama-half-base+llama-lora, parameters: {weight: 1000}}
dtype: float32
"""
TIED_BASE = """
merge_method: task_arithmetic
base_model: llama-tied-base
models:
  - {model: llama-a, parameters: {weight: 0.25}}
dtype: float32
"""

# What other tools of MergeKit make, or where Weft differs.
# What an input has of its own goes by its tensor's name, and what all share by the output's.
MOVED = """\
merge_method: linear
slices:
  - sources:
      - model: llama-deep
        layer_range: [2, 4]
        parameters: {weight: [{filter: "layers.3.", value: 0.9}, {value: 0.2}]}
      - model: llama-a
        layer_range: [0, 2]
        parameters:
          weight:
            - {filter: "layers.1.", value: 0.7}
            - {filter: "layers.0.mlp", value: 0.1}
            - {value: 0.4}
  - sources:
      - {model: llama-a, layer_range: [1, 3], parameters: {weight: 0.3}}
      - model: llama-deep
        layer_range: [3, 5]
        parameters: {weight: [{filter: "layers.4.", value: 2}, {value: 1}]}
parameters:
  normalize:
    - {filter: "layers.1.", value: false}
    - {filter: "layers.3.", value: false}
    - {value: true}
dtype: float32
"""
APPENDED = """\
merge_method: karcher
base_model: llama-base
models: [{model: llama-a}, {model: llama-b}]
dtype: float32
"""
OTHERS = {"several": SEVERAL, "more in the last": MORE_IN_THE_LAST}
OTHERS |= {"gemma3vl model_stock_rows": of_method("model_stock_rows", "gemma3vl")}
OTHERS |= {"mixtral slerp, fused": of_method("slerp", "mixtral")}
OTHERS |= {f"{kind} arcee_fusion": FUSION.replace("{kind}", kind) for kind in ("llama", "gemma3vl")}
OTHERS |= {"adapter on bfloat16": ADAPTER_ON_BFLOAT16, "tied base": TIED_BASE}
# Which methods are compared on another architecture than Llama: each on one at least, and those of
# single rows where MergeKit has weights of three or four dimensions.
ELSEWHERE = {
    "qwen2": ("linear_raw", "task_arithmetic", "breadcrumbs", "sce", "multislerp", "nearswap"),
    "gemma2": ("ties_raw", "breadcrumbs_ties", "model_stock", "karcher", "ram"),
    "mixtral": ("task_arithmetic", "nuslerp", "ramplus_tl", "model_stock_rows"),
    "gemma3vl": ("nuslerp_rows", "nuslerp_columns"),
}
ELSEWHERE = {kind: ("ties", "slerp", "linear", *more) for kind, more in ELSEWHERE.items()}
RECIPES = {
    **{f"llama {case}": of_method(case, "llama") for case in METHODS},
    **{
        f"{kind} {case}": of_method(case, kind)
        for kind, cases in ELSEWHERE.items()
        for case in cases
    },
    "gradients": GRADIENTS,
    "slerp": SLERP,
    "stacked": STACKED,
    "scaled": SCALED,
    "sliced ties": SLICED_TIES,
    "slice base": SLICE_BASE,
    "modules": MODULES,
    "precedence": PRECEDENCE,
    "tied": ONE_TIED,
    "filters in moved slices": MOVED,
    "base appended": APPENDED,
}
