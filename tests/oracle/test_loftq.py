"""LoftQ: adapters that real PEFT initialised so, and what its base has to be.

LoftQ (arXiv:2310.08659) trains on Q = dequantised NF4 of W, A₀ and B₀ being the first singular
directions of W − Q. The adapters of `tests/corpus` were made without bitsandbytes, with the
quantiser that PEFT had itself up to 0.19: blocks of 64 values, each over its largest.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from corpus.models import MODELS
from safetensors.torch import load_file, save_file

import weft
from oracle import corpus_entries as known
from weft.core.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from oracle.corpus_entries import Entry

pytestmark = pytest.mark.oracle

ENTRIES = [entry for entry in known.entries() if entry.kind == "init-loftq"]
EACH = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    known.unpack(folder)
    return folder


def nf4(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Q of W: each value the nearest of 16 quantiles of a normal distribution, by blocks of 64."""
    quantile, end = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    table = np.sort(np.array([*above, 0, *below], np.float32))
    table /= table.max()
    blocks = weight.reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    places = np.abs((blocks / largest)[:, :, None] - table).argmin(axis=2)
    return (table[places] * largest).reshape(weight.shape)


def modules(entry: Entry, corpus: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of the weight -> A and B."""
    tensors = entry.tensors(corpus)
    return {
        key.removeprefix("base_model.model.").replace("lora_A.", ""): (
            A,
            tensors[key.replace("lora_A", "lora_B")],
        )
        for key, A in tensors.items()
        if "lora_A" in key
    }


def quantised(entry: Entry, corpus: Path, folder: Path) -> dict[str, Tensor]:
    """The base that LoftQ left, written into `folder`; -> its tensors."""
    base = load_file(corpus / "bases" / entry.model / "model.safetensors")
    for name in modules(entry, corpus):
        base[name] = torch.from_numpy(nf4(base[name].numpy()))
    folder.mkdir()
    save_file({n: v.double() for n, v in base.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes(
        (corpus / "bases" / entry.model / "config.json").read_bytes()
    )
    return base


def distance(entry: Entry, corpus: Path, folder: Path) -> float:
    """Between what the model in `folder` computes and what the trained one did."""
    model = MODELS[entry.model]
    want = entry.outputs(corpus)[""]
    return float((model.compute(model.load(folder).double()) - want).abs().max() / want.abs().max())


@EACH
def test_on_what_it_left(corpus: Path, tmp_path: Path, entry: Entry) -> None:
    """W = Q: the merged model computes what the trained one did; on W itself it does not."""
    quantised(entry, corpus, tmp_path / "quantised")
    for name, base in (("right", tmp_path / "quantised"), ("wrong", corpus / "bases/decoder")):
        weft.merge(base, entry.folder(corpus), output=tmp_path / name, init_adapter="none")
    assert distance(entry, corpus, tmp_path / "right") < 1e-6
    assert distance(entry, corpus, tmp_path / "wrong") > 0.01


@EACH
def test_the_initial_adapter_does_not_give_it(corpus: Path, tmp_path: Path, entry: Entry) -> None:
    """W + s · (B A − B₀ A₀), right for PiSSA, leaves out what of W − Q is beyond rank r."""
    left = quantised(entry, corpus, tmp_path / "quantised")
    base = load_file(corpus / "bases" / entry.model / "model.safetensors")
    initial, moved = {}, dict(base)
    for name, (A, B) in modules(entry, corpus).items():
        U, S, Vh = torch.linalg.svd(base[name].double() - left[name].double())
        rank = len(A)
        B0, A0 = U[:, :rank] * S[:rank].sqrt(), S[:rank].sqrt()[:, None] * Vh[:rank]
        stem = "base_model.model." + name.removesuffix("weight")
        initial |= {f"{stem}lora_A.weight": A0.float(), f"{stem}lora_B.weight": B0.float()}
        moved[name] = base[name].double() + 1.5 * (B.double() @ A.double() - B0 @ A0)
    folder = tmp_path / "moved"
    folder.mkdir()
    save_file({n: v.double() for n, v in moved.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((tmp_path / "quantised/config.json").read_bytes())
    assert distance(entry, corpus, folder) > 0.01
    given = tmp_path / "initial"
    given.mkdir()
    save_file({k: v.contiguous() for k, v in initial.items()}, given / "adapter_model.safetensors")
    (given / "adapter_config.json").write_bytes(
        (entry.folder(corpus) / "adapter_config.json").read_bytes()
    )
    for init_adapter in (None, given):
        with pytest.raises(PlanError, match="LoftQ") as error:
            weft.plan_merge(
                corpus / "bases" / entry.model, entry.folder(corpus), init_adapter=init_adapter
            )
        assert "dequantised" in str(error.value.hint)
        assert "--init-adapter none" in str(error.value.hint)
        assert ("does not give it" in str(error.value)) == (init_adapter is not None)
