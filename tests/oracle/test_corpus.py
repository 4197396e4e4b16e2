"""Adapters that real releases of PEFT wrote, from `tests/corpus`, against what they recorded.

On record are what the trained model computes, unmerged; what PEFT's own merge of it computes, where
that is something else; and digests of the tensors that this merge makes. Every exception is in a
table of `corpus_entries`, with its reason; an entry that no longer needs one fails.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import pytest
import torch
from corpus.models import MODELS, arithmetic, digest
from safetensors.torch import load_file, save_file

import weft
from oracle import corpus_entries as known
from oracle import formulas
from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from oracle.corpus_entries import Entry

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
ENTRIES = list(known.entries())
REFUSED = [entry for entry in ENTRIES if known.rule(known.REFUSED, entry)]
MERGED = [entry for entry in ENTRIES if not known.rule(known.REFUSED, entry)]
MOVED = [entry for entry in ENTRIES if known.rule(known.MOVED, entry)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    known.unpack(folder)
    for base in (folder / "bases").iterdir():
        values = load_file(base / "model.safetensors")
        half = {name: value.bfloat16() for name, value in values.items()}
        for name, kind, tensors in (
            ("double", torch.float64, values),
            ("half", torch.bfloat16, half),
            ("half-in-double", torch.float64, half),
        ):
            shutil.copytree(base, folder / name / base.name)
            converted = {name: value.to(kind) for name, value in tensors.items()}
            path = folder / name / base.name / "model.safetensors"
            save_file(converted, path, {"format": "pt"})
    return folder


@pytest.fixture(autouse=True, scope="module")
def _no_fsync() -> Iterator[None]:
    """What survives a power cut is looked at elsewhere, and here are a thousand merges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@dataclass
class Case:
    """An entry, merged by Weft into its base in several dtypes, each when it is asked for."""

    entry: Entry
    corpus: Path
    tmp: Path

    def merge(self, base: str) -> Path:
        folder = self.tmp / base
        if not folder.exists():
            source = self.corpus / base / self.entry.model
            weft.merge(
                source,
                self.entry.folder(self.corpus),
                output=folder,
                threads=1,
                init_adapter=self.entry.initial(self.corpus),
            )
        return folder

    def tensors(self, base: str) -> dict[str, Tensor]:
        return load_file(self.merge(base) / "model.safetensors")

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        return self.tensors("double")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self.entry.outputs(self.corpus)

    def compute(self, folder: Path) -> Tensor:
        """What the model in `folder` computes, in float64."""
        model = MODELS[self.entry.model]
        extra = {} if model.build else {"dtype": torch.float64}
        return model.compute(model.load(folder, **extra).double())

    def differing(self, base: str, column: int) -> list[str] | None:
        """Names of the tensors that PEFT's merge gives other bytes; None if it does not merge."""
        recorded = self.entry.record.get("merged", {})
        record = {n: row[column] for n, row in recorded.items() if column < len(row)}
        if not record:
            return None
        before = load_file(self.corpus / base / self.entry.model / "model.safetensors")
        if self.entry.model.endswith("tied"):
            before["lm_head.weight"] = before["model.embed_tokens.weight"]
        return [
            name
            for name, value in self.tensors(base).items()
            if digest(value) != (record.get(name) or digest(before[name]))
        ]


def each(chosen: Iterable[Entry]) -> Any:
    return pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.id) for entry in chosen])


def distance(got: Tensor, want: Tensor) -> float:
    """Relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max())


@each([*REFUSED, *MOVED])
def test_refused(corpus: Path, tmp_path: Path, entry: Entry) -> None:
    rule = known.rule([*known.REFUSED, *known.MOVED], entry)
    assert rule
    with pytest.raises(WeftError) as error:
        weft.merge(corpus / "bases" / entry.model, entry.folder(corpus), output=tmp_path / "merged")
    assert rule.why in str(error.value)
    assert not (tmp_path / "merged").exists()


@each(MERGED)
def test_merged(corpus: Path, tmp_path: Path, entry: Entry) -> None:
    """Weft's merge is what was trained, in every dtype, and has PEFT's bytes where they are right.

    The oracles: the unmerged forward pass in float64; W′ in float64, rounded; PEFT's own merge, by
    its digests and, where it is wrong, by what it computes.
    """
    case = Case(entry, corpus, tmp_path)
    check_warnings(case)
    check_forward(case)
    check_algebra(case)
    check_rounding(case)
    check_bytes(case, "bases", "float32", 0)
    check_bytes(case, "half", "bfloat16", 1)


def check_warnings(case: Case) -> None:
    """Whatever PEFT saved is what its config says."""
    folder = case.entry.folder(case.corpus)
    initial = case.entry.initial(case.corpus)
    assert bool(initial) == bool(known.rule(known.MOVED, case.entry))
    base = case.corpus / "bases" / case.entry.model
    plan = weft.plan_merge(base, folder, init_adapter=initial)
    doubt = known.rule(known.DOUBTED, case.entry)
    assert len(plan.warnings) == (1 if doubt else 0)
    assert all(doubt.why in warning for warning in plan.warnings if doubt)
    assert [
        rule
        for rule in known.NOTED
        if rule.of(case.entry) != any(rule.why in note for note in plan.plan.notes)
    ] == []


def check_forward(case: Case) -> None:
    """The merged model computes what the trained one did, and PEFT's merge where that is right."""
    entry, outputs = case.entry, case.outputs
    got, want = case.compute(case.merge("double")), outputs[""]
    wrong = known.rule(known.MISMERGED, entry)
    assert bool(wrong) == ("merged" in outputs)
    if known.RESIZED.of(entry):
        assert got.shape[-1] < want.shape[-1]
        want = want[:, : got.shape[-1]]
    elif wrong:
        assert distance(outputs["merged"], got) > 0.01
    if known.rule(known.LOST, entry):
        assert distance(got, want) > 0.01
        want = outputs["loaded"]
    if known.rule(known.WRONG, entry):
        assert distance(got, want) > 0.01
        return
    single = "float32" in entry.record or known.rule(known.SINGLE, entry)
    assert distance(got, want) <= (5e-6 if single else 1e-12)


def check_algebra(case: Case) -> None:
    """Every tensor that changes is what the formula of its kind gives, in float64."""
    if known.rule(known.NO_FORMULA, case.entry):
        return
    entry, got = case.entry, dict(case.exact)
    expected = formulas.merged(entry, case.corpus)
    if entry.model.endswith("tied"):
        got.setdefault("lm_head.weight", got["model.embed_tokens.weight"])
    tolerance = 5e-6 if known.rule(known.SINGLE_ALGEBRA, entry) else 2e-12
    for name, value in expected.items():
        assert distance(got[name], torch.from_numpy(value)) <= tolerance, name
    base = formulas.base_of(entry, case.corpus)
    others = got.keys() - expected.keys()
    assert [n for n in others if not torch.equal(got[n], torch.from_numpy(base[n]))] == []


def check_rounding(case: Case) -> None:
    """In float32 W′ is that of float64 but for the last bits."""
    tensors = case.tensors("bases")
    assert tensors.keys() == case.exact.keys()
    for name, value in tensors.items():
        assert distance(value.double(), case.exact[name]) <= 2e-6, name


def check_bytes(case: Case, base: str, dtype: str, column: int) -> None:
    """Every tensor has the bytes that PEFT's merge gives it, or a reason for others.

    In bfloat16, Weft's are then those nearest to W′ in float64.
    """
    entry = case.entry
    differing = case.differing(base, column)
    if differing is None or not (same_arithmetic(entry) or exact_sums(case)):
        return
    tables = [*known.MISMERGED, *known.BITS]
    rules = [rule for rule in tables if rule.of(entry) and rule.dtype in ("", dtype)]
    assert [name for name in differing if not any(rule.allows(name) for rule in rules)] == []
    needed = [rule for rule in rules if not rule.partly]
    assert [rule for rule in needed if not any(map(rule.allows, differing))] == []
    if base == "half" and differing and not known.rule(known.STORED, entry):
        ours, exact = case.tensors("half"), case.tensors("half-in-double")
        for name in differing:
            assert nearest(ours[name], exact[name]), name


def nearest(got: Tensor, exact: Tensor) -> bool:
    """Whether no bfloat16 is nearer to `exact`, but for the error of float32."""
    half_a_step = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 9)
    return bool(((got.double() - exact).abs() <= half_a_step + 1e-6 * exact.abs().max()).all())


@cache
def this_arithmetic() -> str:
    return arithmetic()


def same_arithmetic(entry: Entry) -> bool:
    """Whether this machine adds up as the one that made the corpus did."""
    return entry.arithmetic == this_arithmetic()


def exact_sums(case: Case) -> bool:
    """Whether no machine rounds the sums in PEFT's merge: values are multiples of 1/64."""
    config = case.entry.config(case.corpus)
    return config["peft_type"] == "LORA" and not config.get("use_dora")


def test_last_bits() -> None:
    """Fails nowhere: it shows in the report where `check_bytes` leaves something out."""
    if not all(map(same_arithmetic, ENTRIES)):
        pytest.skip("this machine adds up in another order than the one that made the corpus")


@each(entry for entry in MERGED if entry.kind == "mha-lora")
def test_attention(corpus: Path, tmp_path: Path, entry: Entry) -> None:
    """PEFT adds the ΔW of `out_proj` twice, in training as well; Weft adds it once, and says so."""
    case = Case(entry, corpus, tmp_path)
    base = load_file(corpus / "double" / "mha" / "model.safetensors")
    values = dict(case.exact)
    values["mha.out_proj.weight"] += values["mha.out_proj.weight"] - base["mha.out_proj.weight"]
    (tmp_path / "twice").mkdir()
    save_file(values, tmp_path / "twice" / "model.safetensors")
    # Its forward pass merges in_proj and takes that back, in float32: the recorded W is not W.
    assert distance(case.compute(tmp_path / "twice"), case.outputs[""]) <= 1e-7


@each(entry for entry in MERGED if entry.kind == "lokr" and known.rule(known.NOTED, entry))
def test_old_lokr(corpus: Path, tmp_path: Path, entry: Entry) -> None:
    """PEFT of today scales what PEFT before 0.14 trained without alpha / r; Weft does not."""
    import peft

    case = Case(entry, corpus, tmp_path)
    model = MODELS[entry.model]
    base = model.load(corpus / "double" / entry.model)
    theirs = peft.PeftModel.from_pretrained(base, entry.folder(corpus)).eval().double()
    trained = case.outputs[""]
    assert distance(case.compute(case.merge("double")), trained) <= 1e-12
    assert distance(model.compute(theirs), trained) > 0.01
    assert distance(model.compute(theirs.merge_and_unload()), trained) > 0.01
