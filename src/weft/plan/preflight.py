"""What can be said before a weight is read: quantised bases, memory, the size of the work."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.core.blocks import BLOCK, COPIERS, COPY_BUFFER, STRIP, WORKERS
from weft.core.dtypes import WEIGHTS, itemsize
from weft.core.errors import Problem
from weft.core.specs import Checkpoint, Load, Plan, job_bytes, leaves
from weft.plan.layout import lasting, layout, scratch, shared_at_once

if TYPE_CHECKING:
    from collections.abc import Iterable

# A Python process with torch imported, measured with torch 2.13 (CPU build) on Linux.
_RUNTIME = 260_000_000
# Names that quantised weights leave beside (or in place of) `weight`, and who writes them.
_QUANTISED_NAMES = {
    "qweight": "GPTQ or AWQ",
    "weight_scale_inv": "FP8 with block scales",
    "weight_packed": "compressed-tensors",
    "weight_scale": "FP8 or compressed-tensors",
    "SCB": "bitsandbytes, 8 bits",
    "weight.absmax": "bitsandbytes, 4 bits",
    "weight.quant_map": "bitsandbytes, 4 bits",
}
# What `quant_method` says in lower case.
_SPELT = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4"}


def quantised(base: Checkpoint) -> list[Problem]:
    """Why nothing can be added to this base or taken off it, if its weights are quantised."""
    hint = "give the 16-bit model that it was quantised from; what is made of it can be quantised"
    eight = (
        "give the 16-bit model that it was quantised from, or write one: transformers' "
        "from_pretrained with quantization_config=FineGrainedFP8Config(dequantize=True), then "
        "save_pretrained"
    )
    method = config_value(base.config, "quantization_config")
    if isinstance(method, dict):
        name = _by_config(method)
        what = f"{base.given} is quantised ({name}, says its config.json)"
        return [Problem(what, eight if name == "FP8" else hint)]
    for name, ref in base.tensors.items():
        last = next((end for end in _QUANTISED_NAMES if name.endswith("." + end)), None)
        fused = name.endswith("_blocks") and name.removesuffix("blocks") + "scales" in base.tensors
        if last or fused:
            kind = _QUANTISED_NAMES[last] if last else "MXFP4"
            kind = _packed(name, base) or kind if last == "qweight" else kind
            what = f"{base.given} is quantised ({kind}: {name} in {ref.file})"
            return [Problem(what, eight if kind.startswith("FP8") else hint)]
    return []


def _by_config(method: dict[str, Any]) -> str:
    """The method by the name that its users know it by."""
    named = str(method.get("quant_method") or "")
    bits = next((b for b in (4, 8) if method.get(f"load_in_{b}bit")), None)
    if bits and named in ("", "bitsandbytes"):
        return f"bitsandbytes, {bits} bits"
    return _SPELT.get(named, named) or "by a method that it does not name"


def _packed(name: str, base: Checkpoint) -> str | None:
    """GPTQ packs the inputs of W, (in / 8, out), and AWQ the outputs, (in, out / 8)."""
    scales = base.tensors.get(name.removesuffix("qweight") + "scales")
    columns = base.tensors[name].shape[-1]
    if scales is None or scales.shape[-1] % columns:
        return None
    return "GPTQ" if scales.shape[-1] == columns else "AWQ"


def config_value(config: dict[str, Any], key: str) -> Any:
    """`key` of a config, or of the text model inside a multimodal one."""
    if config.get(key) is not None:
        return config[key]
    for part in ("text_config", "llm_config", "language_config"):
        inner = config.get(part)
        if isinstance(inner, dict) and inner.get(key) is not None:
            return inner[key]
    return None


def dominant_dtype(sizes: Iterable[tuple[str, int]]) -> str | None:
    """The floating dtype that holds most of the (dtype, bytes)."""
    totals: dict[str, int] = {}
    for dtype, size in sizes:
        if dtype in WEIGHTS:
            totals[dtype] = totals.get(dtype, 0) + size
    return max(totals, key=lambda dtype: totals[dtype]) if totals else None


@dataclass(frozen=True, slots=True)
class Work:
    """The size of a plan: bytes, tensors, and an estimate of peak resident memory in bytes.

    Attributes:
        read: Bytes of the tensors that are read.
        files: That hold them.
        written: Bytes of the output's tensors.
        tensors: In the output.
        changed: Of which have a delta.
        memory: An estimate.
    """

    read: int
    files: int
    written: int
    tensors: int
    changed: int
    memory: int


def measure(plan: Plan, threads: int) -> Work:
    """What `plan` reads and writes, and about how much memory `threads` threads take for it."""
    refs = {(r.file, r.start): r for job in plan.jobs for r in leaves(job.expression)}
    uses = Counter((r.file, r.start) for job in plan.jobs for r in leaves(job.expression))
    blocks, factors, shared = 0, 0, 0
    held = lasting(plan.jobs)
    uses = Counter({key: count for key, count in uses.items() if key not in held})
    for job in plan.jobs:
        if job.is_copy:
            continue
        form = layout(job)
        whole, least = form.rows * form.columns, max(32, form.together) * form.columns
        block, strip = (
            min(whole, max(elements, least)) for elements in (BLOCK["cpu"], STRIP["cpu"])
        )
        # Four float32 matrices and the narrow input; the narrow output of a whole strip.
        blocks = max(blocks, block * (4 * 4 + 4) + strip * itemsize(job.dtype))
        if not isinstance(job.expression, Load):
            small = [r for r in leaves(job.expression) if r.shape != job.shape]
            size = sum(4 * math.prod(ref.shape) for ref in small)
            factors = max(factors, size + scratch(job))
            shared = max(shared, *(4 * r.numel for r in small if uses[r.file, r.start] > 1), 0)
    return Work(
        read=sum(ref.nbytes for ref in refs.values()),
        files=len({ref.file for ref in refs.values()}),
        written=sum(job_bytes(job) for job in plan.jobs),
        tensors=len(plan.jobs),
        changed=sum(not isinstance(job.expression, Load) for job in plan.jobs),
        memory=_RUNTIME
        + threads * WORKERS * (blocks + factors)
        + COPIERS * COPY_BUFFER
        + shared_at_once(plan.jobs) * shared
        + sum(size for _, size in held.values()),
    )
