"""What must hold for any base and any adapter, with no other implementation in sight."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from safetensors.torch import load_file, save_file

import weft
from weft.api import parse_weighted
from weft.core.blocks import BLOCK, STRIP
from weft.core.errors import WeftError
from weft.core.names import Match, match
from weft.core.units import parse_size, show_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

few = settings(max_examples=25, deadline=None)
many = settings(max_examples=200, deadline=None)

UP, EMBEDDING, NORM = "model.layers.0.mlp.up_proj", "model.embed_tokens", "model.norm"
KINDS = ("lora", "dora", "embedding", "bias", "norm", "tokens")
UNIT = 2.0**-24


# ------------------------------------------------------------------------------ bases and adapters


@dataclass(frozen=True)
class Spec:
    """What a base and its adapters are made of; everything else follows from the seed."""

    dtype: str
    rows: int
    columns: int
    vocabulary: int
    strength: float
    adapters: tuple[frozenset[str], ...]
    weights: tuple[float, ...]
    seed: int


@st.composite
def specs(
    draw: st.DrawFn,
    count: int,
    *,
    weights: st.SearchStrategy[float] | None = None,
    smallest: int = 1,
) -> Spec:
    some = st.frozensets(st.sampled_from(KINDS), min_size=1)
    return Spec(
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        rows=draw(st.integers(smallest, 150)),
        columns=draw(st.integers(smallest, 70)),
        vocabulary=draw(st.integers(max(4, smallest), 90)),
        strength=draw(st.sampled_from([0.005, 0.05, 1.0])),
        adapters=tuple(draw(some) for _ in range(count)),
        weights=tuple(draw(st.just(1.0) if weights is None else weights) for _ in range(count)),
        seed=draw(st.integers(0, 2**20)),
    )


@dataclass
class Made:
    """The folders, and what the files hold, in float64."""

    base: Path
    adapters: list[Path]
    tensors: dict[str, Tensor]
    deltas: list[dict[str, Tensor]] = field(default_factory=list)

    def listed(self, weights: Sequence[float]) -> list[str]:
        return [f"{a}:{w!r}" for a, w in zip(self.adapters, weights, strict=True)]


class Maker:
    """Writes what a spec describes, each into a folder of its own."""

    def __init__(self, root: Path) -> None:
        self._folders = (root / str(n) for n in itertools.count())

    def folder(self) -> Path:
        path = next(self._folders)
        path.mkdir()
        return path

    def make(self, spec: Spec) -> Made:
        folder = self.folder()
        random = torch.Generator().manual_seed(spec.seed)

        def values(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        tensors = {
            f"{EMBEDDING}.weight": values(spec.vocabulary, spec.columns),
            f"{UP}.weight": values(spec.rows, spec.columns),
            f"{UP}.bias": values(spec.rows),
            f"{NORM}.weight": values(spec.columns),
            "lm_head.weight": values(spec.vocabulary, spec.columns),
        }
        tensors = {name: value.to(getattr(torch, spec.dtype)) for name, value in tensors.items()}
        config = {"vocab_size": spec.vocabulary, "tie_word_embeddings": False}
        _save(folder / "base", "model", tensors, "config", config)
        made = Made(folder / "base", [], {name: value.double() for name, value in tensors.items()})
        for number, kinds in enumerate(spec.adapters):
            adapter, config, deltas = _adapter(kinds, spec, made.tensors, values)
            _save(folder / f"adapter{number}", "adapter_model", adapter, "adapter_config", config)
            made.adapters.append(folder / f"adapter{number}")
            made.deltas.append(deltas)
        return made


def _save(
    folder: Path, name: str, tensors: dict[str, Tensor], config_name: str, config: dict[str, Any]
) -> None:
    folder.mkdir()
    whole = {key: value.contiguous() for key, value in tensors.items()}
    save_file(whole, folder / f"{name}.safetensors", {"format": "pt"})
    (folder / f"{config_name}.json").write_text(json.dumps(config))


def _adapter(
    kinds: frozenset[str], spec: Spec, base: dict[str, Tensor], values: Any
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """Tensors and config of an adapter of these kinds, and ΔW in float64."""
    rank, alpha = 3, 6
    scaling = alpha / rank
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    W = base[f"{UP}.weight"]
    A, B = values(rank, spec.columns), spec.strength * values(spec.rows, rank)
    product = scaling * (B.double() @ A.double())
    if "dora" in kinds or "lora" in kinds:
        tensors |= {f"{UP}.lora_A.weight": A, f"{UP}.lora_B.weight": B}
        deltas[f"{UP}.weight"] = product
    if "dora" in kinds:
        config["use_dora"] = True
        m = 1 + spec.strength * values(spec.rows).abs()
        tensors[f"{UP}.lora_magnitude_vector"] = m
        V = W + product
        deltas[f"{UP}.weight"] = m.double()[:, None] / V.norm(dim=1, keepdim=True) * V - W
    if "embedding" in kinds and "dora" not in kinds:
        A, B = values(rank, spec.vocabulary), spec.strength * values(spec.columns, rank)
        tensors |= {f"{EMBEDDING}.lora_embedding_A": A, f"{EMBEDDING}.lora_embedding_B": B}
        deltas[f"{EMBEDDING}.weight"] = scaling * (B.double() @ A.double()).T
    elif "tokens" in kinds:
        config["trainable_token_indices"] = indices = [3, 0]
        rows = values(2, spec.columns)
        tensors[f"{EMBEDDING}.token_adapter.trainable_tokens_delta"] = rows
        delta = torch.zeros_like(base[f"{EMBEDDING}.weight"])
        delta[indices] = rows.double() - base[f"{EMBEDDING}.weight"][indices]
        deltas[f"{EMBEDDING}.weight"] = delta
    for kind, name in (("bias", f"{UP}.bias"), ("norm", f"{NORM}.weight")):
        if kind in kinds:
            value = base[name].float() + spec.strength * values(*base[name].shape)
            tensors[name] = value
            deltas[name] = value.double() - base[name]
    return {f"base_model.model.{name}": v for name, v in tensors.items()}, config, deltas


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("properties"))


def merge(
    made: Made, adapters: list[str], folder: Path, **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The output's tensors, and its manifest."""
    weft.merge(made.base, adapters, output=folder / "merged", **{"threads": 2, **kwargs})
    manifest = json.loads((folder / "merged" / "weft.json").read_text())
    return load_file(folder / "merged" / "model.safetensors"), manifest


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# ------------------------------------------------------------------------------------ what holds


@few
@given(spec=specs(2))
def test_weight_zero_is_the_base(maker: Maker, spec: Spec) -> None:
    made = maker.make(spec)
    before = load_file(made.base / "model.safetensors")
    after, manifest = merge(made, made.listed([0.0, 0.0]), maker.folder())
    assert list(after) == list(before)
    assert [name for name in before if not same_bytes(before[name], after[name])] == []
    assert manifest["totals"]["changed"] == 0


@few
@given(spec=specs(2, weights=st.sampled_from([1.0, 0.7, 0.3, -0.5, 2.0])))
def test_order_changes_nothing_but_rounding(maker: Maker, spec: Spec) -> None:
    made = maker.make(spec)
    listed = made.listed(spec.weights)
    one, _ = merge(made, listed, maker.folder())
    other, _ = merge(made, listed[::-1], maker.folder())
    assert set(one) == set(other)
    for name, W in made.tensors.items():
        size = W.abs()
        for deltas, weight in zip(made.deltas, spec.weights, strict=True):
            size = size + abs(weight) * deltas.get(name, torch.zeros_like(W)).abs()
        # Per order: each ΔW times its weight, their sum, and the sum with W, in float32.
        slack = 2 * 4 * UNIT * size
        step = torch.finfo(one[name].dtype).eps * torch.maximum(one[name].abs(), other[name].abs())
        assert ((one[name].double() - other[name].double()).abs() <= slack + step.double()).all()


@few
@given(spec=specs(2, weights=st.sampled_from([1.0, 0.4])))
def test_threads_do_not_show(maker: Maker, spec: Spec) -> None:
    """Neither in the weights nor in the sums: strips are cut, and added up, in one way."""
    made = maker.make(spec)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCK, "cpu", 64)
        patch.setitem(STRIP, "cpu", 64)
        for threads in (1, 2, 5):
            folder = maker.folder()
            _, manifest = merge(made, made.listed(spec.weights), folder, threads=threads)
            data = (folder / "merged" / "model.safetensors").read_bytes()
            found.append((data, manifest["tensors"], manifest["totals"], manifest["plan"]))
    assert found[0] == found[1] == found[2]


@few
@given(spec=specs(2, weights=st.sampled_from([1.0, 0.7, -0.5]), smallest=8))
def test_survival_is_what_it_says(maker: Maker, spec: Spec) -> None:
    """1 − ‖(W′ − W) − ΔW‖ / ‖ΔW‖ and ‖ΔW‖ / ‖W‖, from the output's bytes, in float64."""
    made = maker.make(spec)
    after, manifest = merge(made, made.listed(spec.weights), maker.folder())
    sums = torch.zeros(3, dtype=torch.float64)
    for name, W in made.tensors.items():
        delta = torch.zeros_like(W)
        touched = False
        for deltas, weight in zip(made.deltas, spec.weights, strict=True):
            if name in deltas:
                delta, touched = delta + weight * deltas[name], True
        said = manifest["tensors"][name]
        assert ("survival" in said) == touched
        if not touched:
            continue
        error = after[name].double() - W - delta
        squares = torch.stack([part.square().sum() for part in (W, delta, error)])
        sums += squares
        base, update, lost = squares.sqrt().tolist()
        assert said["survival"] == pytest.approx(1 - lost / update, abs=1e-4)
        assert said["relative"] == pytest.approx(update / base, rel=1e-4)
        assert said["changed"] == (not same_bytes(after[name], W.to(after[name].dtype)))
    base, update, lost = sums.sqrt().tolist()
    assert manifest["totals"]["survival"] == pytest.approx(1 - lost / update, abs=1e-4)
    assert manifest["totals"]["relative"] == pytest.approx(update / base, rel=1e-4)


@pytest.mark.parametrize("size", [1e-2, 3e-3, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_survival_of_an_update_that_is_all_alike(maker: Maker, dtype: str, size: float) -> None:
    """Every element loses the same; errors of the sums do not cancel here."""
    made = maker.make(Spec(dtype, 32, 32, 4, 1.0, (frozenset({"lora"}),), (1.0,), 0))
    ones = torch.ones(32, 32, dtype=getattr(torch, dtype))
    before = load_file(made.base / "model.safetensors") | {f"{UP}.weight": ones}
    save_file(before, made.base / "model.safetensors", {"format": "pt"})
    factors = {"A": torch.full((3, 32), size), "B": torch.full((32, 3), 1 / 6)}
    named = {f"base_model.model.{UP}.lora_{k}.weight": v for k, v in factors.items()}
    save_file(named, made.adapters[0] / "adapter_model.safetensors", {"format": "pt"})
    after, manifest = merge(made, [str(made.adapters[0])], maker.folder())
    update = 2 * factors["B"].double() @ factors["A"].double()
    error = after[f"{UP}.weight"].double() - ones.double() - update
    said = manifest["tensors"][f"{UP}.weight"]
    assert said["survival"] == pytest.approx(1 - float(error.norm() / update.norm()), abs=1e-4)
    assert said["relative"] == pytest.approx(float(update.norm()) / 32, rel=1e-4)
    assert said["changed"] == bool((after[f"{UP}.weight"] != 1).any())


# ----------------------------------------------------------------------------------------- names

part = st.sampled_from(["a", "b", "model", "layers", "0", "1", "norm", "weight", "bias"])
name = st.lists(part, min_size=1, max_size=5).map(".".join)


@many
@given(wanted=st.lists(name, max_size=8), present=st.sets(name, max_size=8))
def test_match_says_of_each_name_one_thing(wanted: list[str], present: set[str]) -> None:
    found = match(wanted, present)
    said = [*found.names, *found.unmatched, *found.ambiguous]
    assert sorted(set(said)) == sorted(set(wanted))
    assert len(set(found.names) & set(found.ambiguous)) == 0
    assert not set(found.unmatched) & (set(found.names) | set(found.ambiguous))
    for want, got in found.names.items():
        assert got in present
        assert got == want or got.endswith("." + want) or want.endswith("." + got)
    for want, several in found.ambiguous.items():
        assert len(set(several)) > 1
        assert set(several) <= present
        assert want not in present


@many
@given(present=st.sets(name, min_size=1, max_size=8), data=st.data())
def test_match_takes_a_name_that_is_there(present: set[str], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(sorted(present)), unique=True))
    found = match(wanted, present)
    assert found.names == {want: want for want in wanted}
    assert not found.edits


@many
@given(
    names=st.sets(st.tuples(part, part, part, part).map(".".join), min_size=1, max_size=8),
    prefix=st.sampled_from(["transformer", "bert", "model.language_model"]),
)
def test_match_finds_the_prefix(names: set[str], prefix: str) -> None:
    """Names of one length are no suffixes of one another, so that a prefix is all they lack."""
    longer = {f"{prefix}.{short}": short for short in names}
    taken, put = match(longer, names), match(names, longer)
    assert taken.names == longer
    assert counts(taken) == {(f"{prefix}.", ""): len(names)}
    assert put.names == {short: long for long, short in longer.items()}
    assert counts(put) == {("", f"{prefix}."): len(names)}


def counts(found: Match) -> dict[tuple[str, str], int]:
    """Edits, and the moves of a part of the model, which are edits that are told otherwise."""
    return found.edits | {change: len(names) for change, names in found.moves.items()}


# ----------------------------------------------------------------------------------------- units

UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


@many
@given(
    count=st.integers(1, 2**12),
    unit=st.sampled_from(sorted(UNITS)),
    byte=st.sampled_from(["", "B", "b"]),
    space=st.sampled_from(["", " "]),
    change=st.sampled_from([str, str.lower, str.upper]),
)
def test_sizes_are_read(count: int, unit: str, byte: str, space: str, change: Any) -> None:
    assert parse_size(change(f"{space}{count}{space}{unit}{byte}{space}")) == count * UNITS[unit]


@many
@given(text=st.text(alphabet="0123456789.kKmMgGiIbB -+e", max_size=12) | st.text(max_size=12))
@example(text="9" * 400)
@example(text="1e5")
@example(text="0")
def test_a_size_is_positive_or_an_error(text: str) -> None:
    try:
        size = parse_size(text)
    except WeftError:
        return
    assert isinstance(size, int)
    assert size > 0


@many
@given(size=st.integers(1, 2**50))
def test_a_size_that_is_shown_reads_back(size: int) -> None:
    """To the three digits that are shown."""
    assert parse_size(show_size(size)) == pytest.approx(size, rel=0.0051)


# --------------------------------------------------------------------------------------- weights

word = st.text(alphabet="abcXYZ019-_./@", min_size=1, max_size=12)


@many
@given(given_name=word, weight=st.floats(allow_nan=False, allow_infinity=False))
def test_a_weight_is_read_exactly(given_name: str, weight: float) -> None:
    found, value = parse_weighted(f"{given_name}:{weight!r}")
    assert found == given_name
    assert value == weight
    assert math.copysign(1, value) == math.copysign(1, weight)


@many
@given(text=st.text(max_size=20))
@example(text="x" * 300 + ":0.5")
@example(text="\0:0.5")
@example(text="a:b:0.5")
@example(text="https://x/y")
def test_what_is_no_weight_stays(text: str) -> None:
    try:
        found, weight = parse_weighted(text)
    except WeftError:
        assert not math.isfinite(float(text.rpartition(":")[2]))
        return
    assert math.isfinite(weight)
    assert text == found or text.startswith(f"{found}:")
    if text == found:
        assert weight == 1


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
def test_a_weight_is_finite(number: str) -> None:
    with pytest.raises(WeftError, match="the weight of adapter is"):
        parse_weighted(f"adapter:{number}")


def test_a_path_that_exists_is_no_weight(tmp_path: Path) -> None:
    path = tmp_path / "adapter:0.5"
    assert parse_weighted(str(path)) == (str(tmp_path / "adapter"), 0.5)
    path.mkdir()
    assert parse_weighted(str(path)) == (str(path), 1.0)
