"""`weft doctor --fix` of adapters that old releases of PEFT wrote: PEFT of today loads the copy.

To the model that was trained, and without a warning that it does not give for its own save of that
kind as well. What it cannot read in any form is refused, with the reason.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from typing import TYPE_CHECKING

import peft
import pytest
import torch
from corpus.models import MODELS
from helpers import WARNINGS
from helpers import load as load_tensors

import weft
from oracle import corpus_entries as known
from oracle import test_experts
from weft.core.errors import WeftError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from oracle.conftest import Lab
    from oracle.corpus_entries import Entry

pytestmark = [pytest.mark.oracle, *map(pytest.mark.filterwarnings, WARNINGS)]

ENTRIES = [entry for entry in known.entries() if not known.rule(known.REFUSED, entry)]
NEWEST = {entry.kind: entry for entry in ENTRIES}

# What today's PEFT reads otherwise than the release that wrote it, and what is written of it.
REWRITTEN = [
    known.Rule("tied-embedding-saved", "ensure_weight_tying: PEFT before 0.3", before="0.3"),
    known.Rule("tied-together", "ensure_weight_tying = false", before="0.19"),
    known.Rule("*bias-all bias-lora-only", "biases as base_layer.bias", before="0.7"),
    known.Rule("bone*", "Bone as MiSS"),
    known.Rule("lokr* conv-lokr*", "alpha = r: PEFT before 0.14", before="0.14"),
    known.Rule("experts-lora experts-down-lora", "factors of fused experts in the order of today",
               before="0.19"),
    known.Rule("*", "without enable_lora, merge_weights", before="0.3"),
]  # fmt: skip
# What it has no form for.
NO_FORM = [
    known.Rule("gpt2-parts", "parts of a fused matrix (enable_lora) up to 0.2 alone"),
    known.Rule("oft-old* conv-oft-old", "this rotates the outputs"),
    known.Rule("oft-blocks oft-coft oft-shared oft-size", "another Neumann series", before="0.18"),
    *known.MOVED,
]
# Of what it writes for layers on a quantised base alone, which the corpus has on plain ones.
QUANTISED = known.Rule("qalora-pooled", "PEFT has QA-LoRA for layers of GPTQ")

# Warnings of transformers and of torch, each once in a process.
OF_OTHERS = ("`is_gradient_checkpointing`", "Sparse invariant checks")
# What an adapter is to today's PEFT, where that is a kind of another name.
IS_NOW = {"bone": "miss", "bone-bat": "miss-bat", "tied-together-0.18.1": "tied-embedding"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    known.unpack(folder)
    return folder


def loaded(entry: Entry, corpus: Path, folder: Path) -> tuple[Tensor, set[str]]:
    """What the model computes that PEFT makes of `folder`, and how its warnings begin."""
    model = MODELS[entry.model]
    base = model.load(corpus / "bases" / entry.model)
    tables = [v for k, v in load_tensors(folder).items() if k.endswith("embed_tokens.weight")]
    if "resized" in entry.kind and tables:
        base.resize_token_embeddings(len(tables[0]))  # which PEFT leaves to the user
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(base, folder).eval()
        output = model.compute(adapted)
    said = {str(w.message) for w in caught}
    return output, {text[:30] for text in said if not text.startswith(OF_OTHERS)}


def truth(entry: Entry, corpus: Path) -> Tensor:
    outputs = entry.outputs(corpus)
    lost = known.rule(known.LOST, entry)
    return outputs["loaded" if lost else ""].float()


def own_warnings(entry: Entry, corpus: Path) -> set[str]:
    """Of what the newest release itself saves."""
    newest = NEWEST[IS_NOW.get(entry.id) or IS_NOW.get(entry.kind) or entry.kind]
    return loaded(newest, corpus, newest.folder(corpus))[1]


def check(entry: Entry, corpus: Path, folder: Path) -> None:
    fixed = folder / "fixed"
    base = corpus / "bases" / entry.model
    if refused := known.rule(NO_FORM, entry):
        with pytest.raises(WeftError, match=re.escape(refused.why)):
            weft.doctor(entry.folder(corpus), base, fix=fixed)
        assert not fixed.exists()
        return
    found = weft.doctor(entry.folder(corpus), base, fix=fixed)
    rules = [rule for rule in REWRITTEN if rule.of(entry)]
    assert len(found.rewritten) == len(rules)
    assert all(any(r.why in line for line in found.rewritten) for r in rules), found.rewritten
    assert weft.doctor(fixed, base).verdict != "unusable"
    if QUANTISED.of(entry):
        with pytest.raises(RuntimeError, match="size mismatch"):
            loaded(entry, corpus, fixed)
        return
    got, said = loaded(entry, corpus, fixed)
    want = truth(entry, corpus)
    if known.RESIZED.of(entry):
        want = want[:, : got.shape[-1]]
    # An inverse of float32 numbers, whose last digits are the processor's.
    room = 2e-4 if entry.kind == "frod" else 1e-5
    assert (got - want).abs().max() <= room * want.abs().max()
    assert not said or said <= own_warnings(entry, corpus)


def picked() -> list[Entry]:
    """For each rule that is needed its newest entry; and some adapters that need none."""
    by_rule: dict[str, Entry] = {}
    for entry in ENTRIES:
        for rule in [r for r in (*REWRITTEN, *NO_FORM) if r.of(entry)]:
            by_rule[f"{rule.why} {rule.kinds}"] = entry
    sound = ("llama-lora", "dora", "ia3", "vera", "tied-resized", "tokens-beside", "conv-lora")
    chosen = [*by_rule.values(), *(NEWEST[kind] for kind in sound)]
    return list({entry.id: entry for entry in chosen}.values())


def oldest_of_each() -> list[Entry]:
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in ENTRIES:
        found[entry.kind].append(entry)
    return [entries[0] for entries in found.values() if entries[0] not in picked()]


@pytest.mark.parametrize("entry", picked(), ids=lambda entry: entry.id)
def test_of_old_releases(corpus: Path, tmp_path: Path, entry: Entry) -> None:
    """Weft, too, merges the copy into what it makes of the original."""
    check(entry, corpus, tmp_path)
    if not known.rule(NO_FORM, entry):
        for name, adapter in (("one", entry.folder(corpus)), ("two", tmp_path / "fixed")):
            weft.merge(corpus / "bases" / entry.model, adapter, output=tmp_path / name)
        one, two = (load_tensors(tmp_path / name) for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize(
    ("kind", "release", "why"),
    [
        ("tied-embedding-saved", "0.2.0", "trained both ends of tied embeddings"),
        ("experts-lora", "0.17.1", "how the factors of fused experts lie"),
    ],
)
def test_what_a_base_says(corpus: Path, tmp_path: Path, kind: str, release: str, why: str) -> None:
    with pytest.raises(WeftError, match=why) as error:
        weft.doctor(corpus / release / kind, fix=tmp_path / "fixed")
    assert "--base BASE" in str(error.value.hint)
    assert not (tmp_path / "fixed").exists()


# ----------------------------------------------------------------------- experts, one by one

EXPERTS = {
    "plain": ("mixtral", {}),
    "rank-stabilised": ("mixtral", {"use_rslora": True}),
    # PEFT 0.21 leaves out what such an adapter has for the experts, and says nothing.
    "beside-a-shared-one": ("qwen2-moe", {"use_rslora": True}),
}


def both_forms(lab: Lab, model: str) -> list[Path]:
    """A base with its experts one by one, and the same with them fused."""
    return [
        lab.make(f"moe-{model}-{form}", test_experts.save_base_as(model, form))
        for form in ("hub", "fused")
    ]


@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern.*")
@pytest.mark.parametrize("name", EXPERTS)
def test_single_experts(lab: Lab, tmp_path: Path, name: str) -> None:
    """Of transformers 4, on a base of transformers 5: told, fused, and by PEFT the same model."""
    model, options = EXPERTS[name]
    hub, fused = both_forms(lab, model)
    names = test_experts.EXPERTS[model]
    adapter = test_experts.write_expert_adapter(hub, tmp_path / "adapter", names=names)
    test_experts.edit(adapter, **options)
    test_experts.weft_merge(hub, adapter, tmp_path / "merged")
    want = test_experts.logits(test_experts.open_base(tmp_path / "merged"))
    found = weft.doctor(adapter, fused, fix=tmp_path / "fixed")
    assert found.verdict == "problems"
    assert ["one by one" in f.what for f in found.findings] == [True]
    assert any("fused, as the base has them" in line for line in found.rewritten)
    with pytest.raises(WeftError, match="one by one"):
        weft.merge(fused, adapter, output=tmp_path / "strict", strict=True)
    assert weft.doctor(tmp_path / "fixed", fused).verdict == "sound"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(test_experts.open_base(fused), tmp_path / "fixed")
    got = test_experts.logits(loaded.eval())
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    for out, source in (("from-one", adapter), ("from-other", tmp_path / "fixed")):
        test_experts.weft_merge(fused, source, tmp_path / out)
    one, two = (load_tensors(tmp_path / out) for out in ("from-one", "from-other"))
    assert all(torch.allclose(one[n], two[n], rtol=1e-5, atol=1e-6) for n in one)
    with pytest.raises(WeftError, match="in one tensor, and these are one by one") as error:
        weft.doctor(adapter, hub, fix=tmp_path / "other")
    assert "save_original_format=False" in str(error.value.hint)


def test_single_experts_on_a_square_base(lab: Lab, tmp_path: Path) -> None:
    """The copy is read as what it is, and not by the release that trained the single experts."""
    hub, fused = both_forms(lab, "mixtral-square")
    names = test_experts.EXPERTS["mixtral"]
    adapter = test_experts.write_expert_adapter(hub, tmp_path / "adapter", names=names)
    test_experts.edit(adapter, peft_version="0.17.1")
    test_experts.weft_merge(hub, adapter, tmp_path / "merged")
    want = test_experts.logits(test_experts.open_base(tmp_path / "merged"))
    weft.doctor(adapter, fused, fix=tmp_path / "fixed")
    test_experts.weft_merge(fused, tmp_path / "fixed", tmp_path / "again")
    got = test_experts.logits(test_experts.open_base(tmp_path / "again"))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern.*")
def test_experts_of_several_alphas(lab: Lab, tmp_path: Path) -> None:
    """Fused they have one scaling, and the copy would be another adapter."""
    hub, fused = both_forms(lab, "mixtral")
    names = test_experts.EXPERTS["mixtral"]
    adapter = test_experts.write_expert_adapter(hub, tmp_path / "adapter", names=names)
    test_experts.edit(adapter, alpha_pattern={"w3": 9})
    with pytest.raises(WeftError, match="several scalings"):
        weft.doctor(adapter, fused, fix=tmp_path / "fixed")


@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern.*")
def test_fused_by_peft(lab: Lab, tmp_path: Path) -> None:
    """PEFT's own conversion of rsLoRA is √2 too large, and its copy by Weft is not."""
    hub, fused = both_forms(lab, "mixtral")
    names = test_experts.EXPERTS["mixtral"]
    adapter = test_experts.write_expert_adapter(hub, tmp_path / "adapter", names=names)
    test_experts.edit(adapter, use_rslora=True)
    test_experts.convert(fused, adapter, tmp_path / "converted")
    test_experts.weft_merge(hub, adapter, tmp_path / "merged")
    want = test_experts.logits(test_experts.open_base(tmp_path / "merged"))
    found = weft.doctor(tmp_path / "converted", fused, fix=tmp_path / "fixed")
    assert any("√2 too large" in line for line in found.rewritten)
    for folder, right in (("converted", False), ("fixed", True)):
        base = test_experts.open_base(fused)
        got = test_experts.logits(peft.PeftModel.from_pretrained(base, tmp_path / folder).eval())
        off = (got - want).abs().max() / want.abs().max()
        assert off <= 1e-5 if right else off > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("entry", oldest_of_each(), ids=lambda entry: entry.id)
def test_of_the_first_release_that_has_it(corpus: Path, tmp_path: Path, entry: Entry) -> None:
    check(entry, corpus, tmp_path)
