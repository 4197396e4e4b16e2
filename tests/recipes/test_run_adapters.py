"""`model+adapter` in a recipe: scaling · B @ A *is* the task vector, to the last bit of float32.

The truth is float64 algebra from the factors, written here from the papers.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch
from running import HIDDEN, MATRIX, checkpoint, llama, lora, random, run
from safetensors.torch import load_file, save_file

from weft import methods

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

NAME = f"{MATRIX.format(1)}.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base") / "base", llama())


# ------------------------------------------------------------------------ the methods, in float64


def largest(d: Tensor, count: int) -> Tensor:
    kept = torch.zeros(d.numel(), dtype=torch.bool)
    kept[d.abs().flatten().argsort(descending=True)[:count]] = True
    return kept.view_as(d)


def outliers_gone(d: Tensor, density: float, gamma: float) -> Tensor:
    n = d.numel()
    order = d.abs().flatten().argsort()
    bottom = n - int(density * n) - int(gamma * n)
    kept = torch.zeros(n, dtype=torch.bool)
    kept[order[bottom : bottom + int(density * n)]] = True
    return kept.view_as(d)


def vote(each: list[Tensor], weights: list[float], *, normalize: bool) -> Tensor:
    e = torch.stack([w * d for w, d in zip(weights, each, strict=True)])
    sign = torch.where(e.sum(0) >= 0, 1.0, -1.0)
    agrees = (e.sign() == sign).double()
    share = (agrees * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)).sum(0)
    mixed = (e * agrees).sum(0)
    return mixed / torch.where(share == 0, 1.0, share) if normalize else mixed


def ties(b: Tensor, d: list[Tensor]) -> Tensor:
    kept = [each * largest(each, int(0.4 * each.numel())) for each in d]
    return b + vote(kept, [0.7, 0.4], normalize=True)


def breadcrumbs(b: Tensor, d: list[Tensor], consensus: bool = False) -> Tensor:
    kept = [each * outliers_gone(each, 0.4, 0.01) for each in d]
    if consensus:
        return b + vote(kept, [0.7, 0.4], normalize=False)
    return b + 0.7 * kept[0] + 0.4 * kept[1]


def sce(b: Tensor, d: list[Tensor]) -> Tensor:
    stack = torch.stack(d)
    spread = stack.var(0, correction=0)
    kept = stack * largest(spread, int(0.4 * int(spread.count_nonzero())))
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agrees = (kept.sign() == sign).double()
    power = kept.square().mean((1, 2))
    w = power / power.sum() if power.sum() >= 1e-6 else torch.full_like(power, 0.5)
    w = w.view(-1, 1, 1)
    return b + (kept * w * agrees).sum(0) / (w * agrees).sum(0).clamp(min=1e-6)


def model_stock(b: Tensor, d: list[Tensor]) -> Tensor:
    cos = (d[0] * d[1]).sum() / max(d[0].norm() * d[1].norm(), 1e-6)
    return b + 2 * cos / (1 + cos) * (d[0] + d[1]) / 2


def ram(b: Tensor, d: list[Tensor]) -> Tensor:
    active = [each.abs() > 1e-5 for each in d]
    count = sum(each.double() for each in active)
    total = sum(each * own for each, own in zip(d, active, strict=True))
    return b + total / torch.as_tensor(count).clamp(min=1)


def ramplus_tl(b: Tensor, d: list[Tensor]) -> Tensor:
    active = torch.stack([each.abs() > 1e-5 for each in d])
    count = active.sum(0)
    change = torch.zeros_like(b)
    for each, own in zip(d, active, strict=True):
        unique, shared = own & (count == 1), own & (count > 1)
        ratio = float(shared.sum()) / max(float(unique.sum()), 1e-5)
        change += each * unique * (1 + 0.1 * min(max(ratio, 0), 0.2))
        change += each * shared / count.clamp(min=1)
    return b + change


def multislerp(b: Tensor, d: list[Tensor]) -> Tensor:
    w = [0.7 / 1.1, 0.4 / 1.1]
    units = [each / (each.norm() + 1e-8) for each in d]
    mean = w[0] * units[0] + w[1] * units[1]
    mean /= mean.norm()
    v = sum(s * (u - (u * mean).sum() * mean) for s, u in zip(w, units, strict=True))
    size = torch.as_tensor(v).norm() + 1e-8
    way = mean * size.cos() + v * size.sin() / size
    return b + way * (w[0] * d[0].norm() + w[1] * d[1].norm())


def nuslerp(b: Tensor, d: list[Tensor]) -> Tensor:
    t = 0.4 / 1.1
    units = [each / each.norm() for each in d]
    theta = (units[0] * units[1]).sum().clamp(-1, 1).acos()
    return b + (((1 - t) * theta).sin() * d[0] + (t * theta).sin() * d[1]) / theta.sin()


def nearswap(b: Tensor, d: list[Tensor]) -> Tensor:
    return b + (4e-5 / d[0].abs().clamp(min=1e-6)).clamp(0, 1) * d[0]


EXACT: dict[str, tuple[Callable[[Tensor, list[Tensor]], Tensor], str, int]] = {
    "task_arithmetic": (lambda b, d: b + 0.7 * d[0] + 0.4 * d[1], "weight", 2),
    "ties": (ties, "weight, density: 0.4", 2),
    "breadcrumbs": (breadcrumbs, "weight, density: 0.4", 2),
    "breadcrumbs_ties": (lambda b, d: breadcrumbs(b, d, True), "weight, density: 0.4", 2),
    "sce": (sce, "select_topk: 0.4", 2),
    "model_stock": (model_stock, "", 2),
    "ram": (ram, "", 2),
    "ramplus_tl": (ramplus_tl, "", 2),
    "multislerp": (multislerp, "weight", 2),
    "nuslerp": (nuslerp, "weight", 2),
    "nearswap": (nearswap, "t: 4.0e-5", 1),
}
DRAWN = {
    "dare_linear": "weight: 0.7, density: 0.5",
    "dare_ties": "weight: 0.7, density: 0.5",
    "della": "weight: 0.7, density: 0.5",
    "della_linear": "weight: 0.7, density: 0.5",
}
# Its score is a softmax of the weights beside |d|, see below.
OTHERS = {"arcee_fusion"}


def recipe(method: str, base: Path, adapters: list[Path], settings: str) -> str:
    lines = [f"merge_method: {method}", f"base_model: {base}", "out_dtype: float32", "models:"]
    shared = [part for part in settings.split(", ") if part and part.split(":")[0] != "weight"]
    for path, weight in zip(adapters, (0.7, 0.4), strict=False):
        lines.append(f"  - model: {base}+{path}")
        if settings.startswith("weight"):
            lines.append(f"    parameters: {{weight: {weight}}}")
    return "\n".join([*lines, f"parameters: {{{', '.join(shared)}}}", ""])


def test_every_method_of_task_vectors_is_compared() -> None:
    assert {
        name for name in methods.names() if methods.method(name).TASK_VECTORS
    } == EXACT.keys() | DRAWN.keys() | OTHERS


@pytest.mark.parametrize("rms", [3e-5, 1e-4, 3e-4])
@pytest.mark.parametrize("method", EXACT)
def test_the_adapter_is_the_task_vector(
    method: str, rms: float, base: Path, tmp_path: Path
) -> None:
    """B + f(scaling · B @ A) in float64, on a bfloat16 base that would swallow most of it."""
    truth, settings, count = EXACT[method]
    deltas = [lora(tmp_path / f"a{n}", n + 1, rms=rms) for n in range(count)]
    folders = [tmp_path / f"a{n}" for n in range(count)]
    found = run(tmp_path, recipe(method, base, folders, settings))
    b = load_file(base / "model.safetensors")
    for name, value in found.items():
        if name not in deltas[0]:
            assert torch.equal(value, b[name].float()), name
            continue
        d = [each[name] for each in deltas]
        # The sum is rounded to float32 once, and no more than that is lost of the change. Of two
        # elements next to a threshold float32 may choose the other one.
        off = (value.double() - truth(b[name].double(), d)).abs() > 2.0**-23 * 0.1
        assert int(off.sum()) <= 2, (name, int(off.sum()))


@pytest.mark.parametrize("rms", [3e-5, 3e-4])
@pytest.mark.parametrize("method", DRAWN)
def test_what_is_drawn_is_of_the_adapter(
    method: str, rms: float, base: Path, tmp_path: Path
) -> None:
    """Each element is the base's, or has all of the task vector times one factor.

    With λ = 1000 nothing is lost in the sum either. DARE and DELLA as MergeKit has them give the
    survivors the L1 norm of all.
    """
    deltas = lora(tmp_path / "a0", 3, rms=rms)
    text = recipe(method, base, [tmp_path / "a0"], f"{DRAWN[method]}, lambda: 1000")
    text = text.replace(
        "parameters: {density", "parameters: {weight: 0.7, normalize: false, density"
    )
    found = run(tmp_path, text)
    b = load_file(base / "model.safetensors")
    for name, d in deltas.items():
        change = found[name].double() - b[name].double()
        kept = change.abs() > 350 * 2 * d.abs() * 0.5
        assert 0.4 < float(kept.double().mean()) < 0.6
        factor = 700 * float(d.abs().sum() / d[kept].abs().sum())
        off = (change - factor * d * kept).abs()
        assert float(off.max()) < 1e-6 * factor * float(d.abs().max()) + 1e-8


def test_fusion_of_an_adapter(base: Path, tmp_path: Path) -> None:
    """Every element is the base's, or has all of the adapter's change: those of the best scores.

    A score is |d| times the divergence of its row's softmax, in which float32 sees less of a change
    than float64: near the threshold one or the other may be taken.
    """
    deltas = lora(tmp_path / "a0", 3, rms=3e-4)
    found = run(tmp_path, recipe("arcee_fusion", base, [tmp_path / "a0"], ""))
    W = load_file(base / "model.safetensors")
    for name, d in deltas.items():
        b = W[name].double()
        taken = found[name].double() != b
        assert float((found[name].double() - b - d * taken).abs().max()) < 2.0**-23 * 0.1
        p, q = (x.softmax(-1) + 1e-8 for x in (b + d, b))
        score = d.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
        order = score.flatten().sort().values
        low, middle, high = (float(order[k * (len(order) - 1) // 4]) for k in (1, 2, 3))
        wanted = score >= middle + 1.5 * (high - low)
        assert 0.01 < float(wanted.double().mean()) < 0.3
        assert float((taken != wanted).double().mean()) < 0.01


def test_what_mergekit_loses(base: Path, tmp_path: Path) -> None:
    """It adds the adapter to bfloat16 weights, and subtracts them again from what is left of it.

    Its cast simulated in float64: of the change 70 %, 32 % and 11 % are noise. Weft's own error is
    the float32 rounding of the sum.
    """
    W = load_file(base / "model.safetensors")[NAME].double()
    for rms, share in ((3e-5, 0.70), (1e-4, 0.32), (3e-4, 0.11)):
        d = lora(tmp_path / f"a{rms}", 7, rms=rms)[NAME]
        theirs = (W + d).bfloat16().double() - W
        assert float((theirs - d).norm() / d.norm()) == pytest.approx(share, rel=0.25)
        text = recipe("task_arithmetic", base, [tmp_path / f"a{rms}"], "weight")
        text = text.replace("parameters: {}", "parameters: {lambda: 1.0e+3, weight: 1}")
        text = text.replace("    parameters: {weight: 0.7}\n", "")
        ours = (run(tmp_path, text, f"out{rms}")[NAME].double() - W) / 1000
        assert float((ours - d).norm() / d.norm()) < 1e-6


def test_several_adapters_with_weights(base: Path, tmp_path: Path) -> None:
    a, b = (lora(tmp_path / name, seed, rms=1e-4) for name, seed in (("a", 1), ("b", 2)))
    found = run(
        tmp_path,
        f"""
        merge_method: task_arithmetic
        base_model: {base}
        out_dtype: float32
        models:
          - model: {base}+{tmp_path}/a:0.7+{tmp_path}/b:0.3
            parameters: {{weight: 1000}}
        """,
    )
    W = load_file(base / "model.safetensors")[NAME].double()
    d = 0.7 * a[NAME] + 0.3 * b[NAME]
    assert float(((found[NAME].double() - W) / 1000 - d).norm() / d.norm()) < 1e-6


def test_a_base_with_an_adapter(base: Path, tmp_path: Path) -> None:
    """Both stand on one checkpoint: the task vector is the difference of their deltas."""
    a, b = (lora(tmp_path / name, seed, rms=3e-5) for name, seed in (("a", 1), ("b", 2)))
    found = run(
        tmp_path,
        f"""
        merge_method: task_arithmetic
        base_model: {base}+{tmp_path}/a
        out_dtype: float32
        models:
          - model: {base}+{tmp_path}/b
            parameters: {{weight: 1000}}
          - model: {base}
            parameters: {{weight: 500}}
        """,
    )
    W = load_file(base / "model.safetensors")[NAME].double()
    d = 1000 * (b[NAME] - a[NAME]) - 500 * a[NAME]
    assert float((found[NAME].double() - W - a[NAME] - d).norm() / d.norm()) < 1e-6


def test_adapters_on_different_bases(base: Path, tmp_path: Path) -> None:
    """The other base's distance is taken in float32, and the adapter's delta on top of it."""
    other = checkpoint(tmp_path / "other", llama(1))
    a, b = (lora(tmp_path / name, seed, rms=1e-4) for name, seed in (("a", 1), ("b", 2)))
    found = run(
        tmp_path,
        f"""
        merge_method: task_arithmetic
        base_model: {base}
        out_dtype: float32
        models:
          - model: {other}+{tmp_path}/a
            parameters: {{weight: 300}}
          - model: {base}+{tmp_path}/b
            parameters: {{weight: 200}}
        """,
    )
    W, V = (load_file(path / "model.safetensors") for path in (base, other))
    for name in W:
        shared, apart = W[name].double(), V[name].double() - W[name].double()
        zero = torch.zeros_like(shared)
        want = 300 * (apart + a.get(name, zero)) + 200 * b.get(name, zero)
        assert float((found[name].double() - shared - want).norm() / want.norm()) < 1e-6, name


def test_dora(base: Path, tmp_path: Path) -> None:
    """M / ‖W + sBA‖ · (W + sBA) − W, of which the distance is taken in float32."""
    d = lora(tmp_path / "a", 1, rms=1e-3)
    file = tmp_path / "a/adapter_model.safetensors"
    W = load_file(base / "model.safetensors")
    factors = load_file(file)
    want = {}
    for name, delta in d.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"
        V = W[name].double() + delta
        factors[key] = (V.norm(dim=1) * (1 + 0.1 * random(HIDDEN, seed=5))).float()
        want[name] = factors[key].double()[:, None] / V.norm(dim=1, keepdim=True) * V - W[name]
    save_file(factors, file, {"format": "pt"})
    config = json.loads((tmp_path / "a/adapter_config.json").read_text()) | {"use_dora": True}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    text = recipe("ties", base, [tmp_path / "a"], "weight")
    found = run(tmp_path, text.replace("weight: 0.7", "weight: 0.5"))
    for name, delta in want.items():
        # One model: TIES at density 1 keeps all, and `normalize` takes the weight out again.
        off = found[name].double() - W[name].double() - delta
        assert float(off.norm() / delta.norm()) < 1e-5


def test_linear_of_a_model_with_an_adapter(base: Path, tmp_path: Path) -> None:
    """No task vectors: the weights of both are summed, in float32, and rounded once."""
    d = lora(tmp_path / "a", 1, rms=1e-4)
    other = checkpoint(tmp_path / "other", llama(2))
    found = run(
        tmp_path,
        f"""
        merge_method: linear
        models:
          - {{model: {base}+{tmp_path}/a, parameters: {{weight: 3}}}}
          - {{model: {other}, parameters: {{weight: 1}}}}
        """,
    )
    W, V = (load_file(path / "model.safetensors") for path in (base, other))
    want = (3 * (W[NAME].double() + d[NAME]) + V[NAME].double()) / 4
    assert found[NAME].dtype == torch.bfloat16
    unit = 2 ** want.abs().log2().floor()
    exact = (found[NAME].double() - want).abs() <= 2.0**-8 * unit * 1.0001
    assert bool(exact.all())


def test_an_adapter_alone_stands_on_the_base_that_it_names(base: Path, tmp_path: Path) -> None:
    """`model: adapter`, as issue 161 of MergeKit asks for."""
    d = lora(tmp_path / "a", 1, rms=1e-3, base=str(base))
    found = run(tmp_path, f"merge_method: passthrough\nmodels: [model: {tmp_path}/a]")
    W = load_file(base / "model.safetensors")
    want = (W[NAME].double() + d[NAME]).float().bfloat16()
    assert torch.equal(found[NAME], want)
    assert math.isclose(float((want != W[NAME]).double().mean()), 1, abs_tol=0.2)
    assert torch.equal(found["lm_head.weight"], W["lm_head.weight"])
