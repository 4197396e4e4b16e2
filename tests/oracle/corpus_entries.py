"""The adapters of `tests/corpus`, and a table for each way to be an exception, with reasons."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

CORPUS = Path(__file__).parents[1] / "corpus"


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@dataclass(frozen=True)
class Entry:
    """One adapter of the corpus."""

    release: str
    kind: str
    record: dict[str, Any]
    arithmetic: str

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.release}"

    @property
    def model(self) -> str:
        return str(self.record["model"])

    def folder(self, corpus: Path) -> Path:
        return corpus / self.release / self.kind

    def initial(self, corpus: Path) -> Path | None:
        """The adapter before training, where that is saved."""
        path = self.folder(corpus) / "initial"
        return path if path.exists() else None

    def config(self, corpus: Path) -> dict[str, Any]:
        path = self.folder(corpus) / "adapter_config.json"
        config: dict[str, Any] = json.loads(path.read_text())
        return config

    def tensors(self, corpus: Path) -> dict[str, Tensor]:
        path = self.folder(corpus) / "adapter_model.safetensors"
        if path.exists():
            return load_file(path)
        tensors: dict[str, Tensor] = torch.load(path.with_suffix(".bin"), weights_only=True)
        return tensors

    def initial_tensors(self, corpus: Path) -> dict[str, Tensor]:
        path = self.initial(corpus)
        return load_file(path / "adapter_model.safetensors") if path else {}

    def outputs(self, corpus: Path) -> dict[str, Tensor]:
        """What the trained model computes, under ""; the one that PEFT loads and merges."""
        values = load_file(corpus / self.release / "expected.safetensors")
        return {
            key.removeprefix(self.kind).removeprefix("/"): value
            for key, value in values.items()
            if key.split("/")[0] == self.kind
        }


def entries() -> Iterable[Entry]:
    for path in sorted(CORPUS.glob("[0-9]*.json"), key=lambda path: numbers(path.stem)):
        index = json.loads(path.read_text())
        for kind, record in index["kinds"].items():
            yield Entry(path.stem, kind, record, index["arithmetic"])


def unpack(folder: Path) -> None:
    """The archives, each as a folder in `folder`."""
    for path in CORPUS.glob("*.tar.xz"):
        with tarfile.open(path) as tar:
            tar.extractall(folder / path.name.removesuffix(".tar.xz"), filter="data")


@dataclass(frozen=True)
class Rule:
    """An exception.

    Attributes:
        kinds: Patterns, with spaces between.
        why: The reason, or the text of the error.
        since: The first release.
        before: The first release that is none any more.
        tensors: Of which tensors, where that is asked: patterns, with spaces between.
        dtype: Of the base, where that is asked; both if it is empty.
        partly: Not all of these entries need it.
    """

    kinds: str
    why: str
    since: str = "0"
    before: str = "99"
    tensors: str = "*"
    dtype: str = ""
    partly: bool = False

    def of(self, entry: Entry) -> bool:
        fits = any(fnmatchcase(entry.kind, pattern) for pattern in self.kinds.split())
        return fits and numbers(self.since) <= numbers(entry.release) < numbers(self.before)

    def allows(self, tensor: str) -> bool:
        return any(fnmatchcase(tensor, pattern) for pattern in self.tensors.split())


def rule(rules: Iterable[Rule], entry: Entry) -> Rule | None:
    return next((rule for rule in rules if rule.of(entry)), None)


# Weft says no, in these words.
REFUSED = [
    Rule("init-pissa", "was initialised with PiSSA, which moved the base weights"),
    Rule("init-olora", "was initialised with OLoRA, which moved the base weights"),
    Rule("init-loftq", "was initialised with LoftQ, which moved the base weights"),
    Rule("arrow", "Arrow, which routes each token to another adapter: no merged weight"),
    Rule("llama-alora", "aLoRA, which is active after some tokens only: no merged weight"),
    Rule("conv-boft", "rotates other axes of a convolution than later ones", before="0.14"),
    Rule("conv-oft", "in training PEFT adds up the overlapping patches of a convolution"),
    # The new rows of the head, which no adapter is on, are in no file.
    Rule("llama-resized-embedding", "the adapter resizes the vocabulary of some tensors and not",
         since="0.7"),
    Rule("llama-resized-embedding", "model.embed_tokens.weight is [20, 16] in the base",
         before="0.7"),
    Rule("unilora", "the file does not say which values of its vector each module takes"),
    Rule("tinylora-drawn", "which seed drew a module's depends on the order of the modules"),
    # 0.19 draws the projections of all modules alike, from Python's salted hash of a name.
    Rule("tinylora", "is not what projection_seed = 42 gives", before="0.21"),
    *(
        Rule(kind, f"is a {kind.upper().replace('-', '_')} adapter, which cannot be merged")
        for kind in ("adaption-prompt", "cartridge", "cpt", "p-tuning", "prefix-tuning",
                     "prompt-tuning", "adamss", "lily", "psoft", "shadow", "xlora")
    ),
]  # fmt: skip

# Refused in these words as well, and merged with what the adapter was before training.
MOVED = [
    Rule(kind, f"was initialised with {name}, which moved the base weights")
    for kind, name in (("pissa", "PiSSA"), ("olora", "OLoRA"), ("corda", "CorDA"),
                       ("lora-ga", "LoRA-GA"))
]  # fmt: skip

# The file lacks what was trained: the merged model is the one that PEFT loads.
LOST = [
    Rule("bias-lora-only", "trained biases are not saved", since="0.8", before="0.21"),
    Rule("boft-bias", "trained biases are not saved", before="0.21"),
    Rule("tied-embedding-saved", "the head is trained along with what it is tied to, and not saved",
         since="0.3", before="0.6"),
]  # fmt: skip
RESIZED = Rule("*-resized", "new rows are not saved", before="0.11")

# Weft merges these, and warns.
DOUBTED = [
    Rule("bias-lora-only", "none is in the file", since="0.7", before="0.21"),
    Rule("tied-embedding-saved", "trained lm_head.weight along with model.embed_tokens.weight",
         since="0.3", before="0.6"),
]  # fmt: skip

# Weft merges these, and says how.
NOTED = [
    Rule("lokr* conv-lokr*", "PEFT before 0.14, which trains LoKr without alpha", before="0.14")
]

# Weft merges these into something else than what was trained.
WRONG = [
    Rule("mha-lora", "the ΔW of out_proj is added twice in training: see test_attention"),
]  # fmt: skip

# Not even the double of a trained model computes in float64 alone.
SINGLE = [
    Rule("c3a", "Fourier transforms in float32"),
    Rule("fourierft gpt2-fourierft", "the inverse transform is in float32", since="0.14"),
    Rule("oft-coft", "the projection's eps is added in float32"),
    Rule("oft-old-coft", "the projection's divisor is a tensor of float32"),
    Rule("vblora-topk", "the saved weights are of float32"),
    Rule("loha-patterns", "alpha / r is a tensor of float32"),
    Rule("deft*", "the decomposition is in float32"),
    Rule("kasa", "the decomposition is in float32"),
    Rule("osf", "the decomposition is in float32, and each processor has its own"),
    Rule("llama-* tied-*", "another release of transformers", before="0.17"),
    Rule("frod", "the decomposition is in float32"),
    Rule("pissa olora corda lora-ga", "the base was moved in float32"),
]  # fmt: skip

_ENDS = "lm_head.weight model.embed_tokens.weight"
# PEFT's merge does not compute what the trained model does.
MISMERGED = [
    Rule("ia3", "the bias is not scaled", before="0.6", tensors="*.bias"),
    Rule("llama-replicated", "every copy's ΔW goes to the weight that they share",
         tensors="model.layers.*"),
    Rule("tied-embedding", "the head that is tied changes as well", tensors="lm_head.weight",
         since="0.5"),
    Rule("dora-embedding", "ΔW is added as if there were no magnitudes", before="0.17"),
    Rule("tied-together", "not the same for both ends, which are one weight", tensors=_ENDS),
]  # fmt: skip

# PEFT's merge has other bytes for another reason.
BITS = [
    Rule("*-resized", "the rows are those of the model that it was given", before="0.11",
         tensors=_ENDS),
    Rule("mha-lora", "the ΔW of out_proj is added twice", tensors="mha.out_proj.weight"),
    # It computes in float32, and in another order.
    Rule("boft* conv-boft oft-* conv-oft-old c3a hra* conv-hra vblora-topk gpt2-fourierft",
         "sums in another order", tensors="*.weight", dtype="float32"),
    Rule("gpt2-dora", "the norm of columns is a sum in float32", dtype="float32"),
    Rule("fourierft waveft", "sums in another order"),
    Rule("waveft-db4", "sums in another order", dtype="float32"),
    Rule("dora-embedding", "the norm of columns is a sum in float32", since="0.17"),
    Rule("kasa frod", "the decomposition is in float32"),
    Rule("osf", "the decomposition is in float32", before="0.21"),
    Rule("road-*", "sums in another order"),
    Rule("pissa olora", "the base is moved anew, and rounded there"),
    Rule("lora-ga", "the base is not moved: another model"),
    # It rounds more than once where the base is in bfloat16.
    Rule("*", "the factors take the base's dtype", since="0.7", before="0.12", dtype="bfloat16",
         partly=True),
    Rule("dora dora-rslora conv-dora-flat llama-dora gpt2-dora ln-tuning conv-ia3",
         "the adapter takes the base's dtype, or the base the adapter's", before="0.16",
         dtype="bfloat16"),
    Rule("ia3", "the factors take the base's dtype", before="0.6", dtype="bfloat16"),
    Rule("conv-lora*", "ΔW is rounded first", since="0.16", before="0.20", dtype="bfloat16"),
    Rule("vera gpt2-vera pvera miss-bat bone-bat", "ΔW is rounded first", before="0.20",
         dtype="bfloat16"),
    Rule("lora-embedding llama-embedding tied-embedding gpt2-embedding", "ΔW is rounded first",
         since="0.7", dtype="bfloat16", tensors="model.embed_tokens.weight *.wte.weight",
         partly=True),
    Rule("llama-ends lora-head", "the saved W is rounded first", since="0.7", dtype="bfloat16",
         tensors=_ENDS),
    Rule("bdlora conv-hira deft* delora experts-* glora-* hira init-mica peanut randlora*",
         "ΔW is rounded first", dtype="bfloat16"),
    Rule("mha-lora", "ΔW is rounded first", dtype="bfloat16", tensors="mha.*"),
]  # fmt: skip

# W′ depends on the dtype of the base for another reason than its last rounding.
STORED = [
    Rule("osf randlora-sparse", "factors are rounded to the dtype that the base is stored in")
]

# What Weft takes of W in float32, as training did.
SINGLE_ALGEBRA = [Rule("osf", "an SVD in float32")]

# Kinds of which `formulas` has no W′.
NO_FORMULA = [
    Rule("vera-drawn randlora-drawn randlora-sparse", "A and B are drawn again, by torch alone")
]
