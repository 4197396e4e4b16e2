"""Checkpoints in float8: which scale belongs to which weight, W = weight · scale.

`X.weight_scale_inv` has a number for each block of `X.weight`, 128 × 128 unless the config says
otherwise (DeepSeek, transformers' FineGrainedFP8Config); `X.weight_scale` has one for the whole
matrix or one for each row (vLLM's fp8, compressed-tensors' float-quantized, ModelOpt's FP8). Both
are multiplied with. Names without a scale are plain tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weft.core.dtypes import OUTPUTS, WEIGHTS
from weft.core.errors import PlanError, Problem
from weft.core.specs import Checkpoint, Load, Plan, Scaled, TensorJob, TensorRef
from weft.core.units import some
from weft.plan.merge import plan_merge
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from weft.plan._views import View

_NUMBERS = ("float8_e4m3fn", "float8_e5m2")
_BLOCK = (128, 128)
_INVERSE, _PLAIN = "_scale_inv", "_scale"  # DeepSeek's is the inverse of what W was multiplied with
_OF_WEIGHTS = ("weight_scale_inv", "weight_scale")
# What quantises inputs, outputs and the cache of attention; W does not depend on it.
_OF_ACTIVATIONS = (
    *("input_scale", "output_scale", "activation_scale"),
    *("q_scale", "k_scale", "v_scale"),
)
# Beside `weight`, these make W something other than weight · weight_scale.
_MORE = ("weight_zero_point", "weight_global_scale", "weight_scale_2", "weight_g_idx")
_OTHER = (
    "give the 16-bit model that it was quantised from: weft reads float8 with weight_scale_inv "
    "(blocks) or weight_scale (one, or one for each row)"
)


def dequantised(base: Checkpoint) -> tuple[Checkpoint, Plan]:
    """The plan of a model without adapters, whose float8 weights are what they stand for.

    Their jobs are float32, which holds weight · scale up to its last bit. The checkpoint comes back
    without its scales.

    Raises:
        PlanError: It is quantised otherwise, or a scale is missing or does not fit; every reason.
    """
    method = config_value(base.config, "quantization_config")
    scales = {name: of for name in base.tensors if (of := _scaled_by(name, base))}
    if (method is not None and not _understood(method)) or (method is None and not scales):
        return base, plan_merge(base, [])
    found, problems = _matched(base, scales, _block_size(method or {}))
    if problems:
        raise PlanError(base.given, problems)
    activations = [n for n in base.tensors if n.rpartition(".")[2] in _OF_ACTIVATIONS]
    aside = {*scales, *activations}
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    for key, part in config.items():
        if isinstance(part, dict):
            config[key] = {k: v for k, v in part.items() if k != "quantization_config"}
    tensors = {name: ref for name, ref in base.tensors.items() if name not in aside}
    plain = replace(base, tensors=tensors, config=config)
    plan = plan_merge(plain, [])
    jobs = tuple(_job(job, found) for job in plan.jobs)
    return plain, replace(plan, jobs=jobs, notes=(*plan.notes, *_said(base, found, activations)))


def in_compute_dtype(view: View) -> View:
    """With float8 weights in the dtype that the model computes in: what is written of them.

    Transformers writes it, too, when it dequantises.
    """
    named = config_value(dict(view.config), "dtype") or config_value(
        dict(view.config), "torch_dtype"
    )
    dtype = named if named in OUTPUTS else "bfloat16"
    jobs = tuple(
        replace(job, dtype=dtype) if isinstance(job.expression, Scaled) else job
        for job in view.plan.jobs
    )
    return replace(view, plan=replace(view.plan, jobs=jobs))


def _scaled_by(name: str, base: Checkpoint) -> str | None:
    """The tensor that `name` is the scale of, if it is one."""
    ending = _INVERSE if name.endswith(_INVERSE) else _PLAIN
    of = name.removesuffix(ending)
    ref = base.tensors.get(of)
    known = name.rpartition(".")[2] in _OF_WEIGHTS or (ref is not None and _is_float8(ref))
    return of if name.endswith(ending) and known else None


def _understood(method: Any) -> bool:
    """The weights are float8 of 8 bits with scales, as this config has it."""
    if not isinstance(method, dict):
        return False
    name = str(method.get("quant_method") or "")
    if name == "modelopt":
        return str(method.get("quant_algo")).upper() == "FP8"
    if name != "compressed-tensors":
        return name in ("fp8", "fbgemm_fp8")
    groups = method.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") if isinstance(group, dict) else None for group in found]
    sparse = method.get("sparsity_config") or {}
    return (
        bool(weights)
        and not method.get("transform_config")
        and (sparse.get("format") if isinstance(sparse, dict) else sparse) in (None, "dense")
        and all(
            isinstance(each, dict) and each.get("type") == "float" and each.get("num_bits") == 8
            for each in weights
        )
    )


def _block_size(method: dict[str, Any]) -> tuple[int, int] | None:
    """Of `weight_scale_inv`; None for what is no size."""
    given = method.get("weight_block_size") or _BLOCK
    if not isinstance(given, list | tuple) or len(given) != 2:
        return None
    rows, columns = given
    fits = all(isinstance(n, int) and n > 0 for n in (rows, columns))
    return (rows, columns) if fits else None


def _matched(
    base: Checkpoint, scales: dict[str, str], size: tuple[int, int] | None
) -> tuple[dict[str, Scaled], list[Problem]]:
    """Every float8 tensor with its scale."""
    if size is None:
        what = f"{base.given}: weight_block_size in its config.json is no pair of numbers"
        return {}, [Problem(what, "[128, 128] is the usual one")]
    problems = [
        Problem(f"{name} in {ref.file} makes W something other than weight · scale", _OTHER)
        for name, ref in base.tensors.items()
        if name.rpartition(".")[2] in _MORE
    ]
    for scale, of in scales.items():
        ref = base.tensors.get(of)
        if ref is None:
            what = f"{scale} in {base.tensors[scale].file} is the scale of {of}, which is missing"
            problems.append(Problem(what, "finish the download, or copy the shard that has it"))
        elif not _is_float8(ref):
            what = f"{base.given} is quantised: {of} in {ref.file} is {ref.dtype}, with {scale}"
            problems.append(Problem(what, _OTHER))
    usual = _PLAIN if scales and not any(n.endswith(_INVERSE) for n in scales) else _INVERSE
    found = {}
    for name, ref in base.tensors.items():
        if not _is_float8(ref) or name in scales:
            continue
        own = [n for n in (f"{name}{_INVERSE}", f"{name}{_PLAIN}") if n in scales]
        if len(own) != 1:
            problems.append(_not_one(name, ref, usual, own))
        elif block := _block(ref, base.tensors[own[0]], size, blocks=own[0].endswith(_INVERSE)):
            found[name] = Scaled(ref, base.tensors[own[0]], block)
        else:
            problems.append(_odd(name, ref, base.tensors[own[0]], size))
    return found, problems


def _is_float8(ref: TensorRef) -> bool:
    return ref.dtype in _NUMBERS


def _block(
    weight: TensorRef, scale: TensorRef, size: tuple[int, int], *, blocks: bool
) -> tuple[int, int] | None:
    """Which part of W each scale is for; None if that is not told."""
    if scale.dtype not in (*WEIGHTS, "float8_e8m0fnu") or len(weight.shape) != 2:
        return None
    rows, columns = weight.shape
    if scale.numel == 1:
        return rows, columns
    if not blocks:
        return (1, columns) if scale.shape in ((rows, 1), (rows,)) else None
    return size if scale.shape == (-(-rows // size[0]), -(-columns // size[1])) else None


def _not_one(name: str, ref: TensorRef, usual: str, own: list[str]) -> Problem:
    if own:
        return Problem(f"{name} has two scales: {own[0]} and {own[1]}", "which of them is meant?")
    return Problem(
        f"{name} in {ref.file} is {ref.dtype}, and its scale {name}{usual} is missing",
        "finish the download, or copy the shard that has it",
    )


def _odd(name: str, weight: TensorRef, scale: TensorRef, size: tuple[int, int]) -> Problem:
    rows, columns = size
    return Problem(
        f"{scale.name} in {scale.file} is {scale.dtype} {list(scale.shape)}, no scale that weft "
        f"knows for {name} {list(weight.shape)}",
        f"weight_scale_inv has a number for each {rows} × {columns} block of a matrix "
        "(weight_block_size in config.json), weight_scale one, or one for each row",
    )


def _job(job: TensorJob, found: dict[str, Scaled]) -> TensorJob:
    if job.name in found and isinstance(job.expression, Load):
        return replace(job, dtype="float32", expression=found[job.name])
    return job


def _said(base: Checkpoint, found: dict[str, Scaled], activations: list[str]) -> list[str]:
    notes = []
    if found:
        notes.append(f"{base.given}: W is weight · scale of {some(list(found), 'float8 tensor')}")
    if activations:
        each = some(activations, "tensor")
        notes.append(f"{base.given}: {each} scale activations, and W does not depend on them")
    return notes
