"""What PEFT can adapt of a model, told from names and shapes: which tensors LoRA has a form for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.core.dtypes import WEIGHTS
from weft.plan._in_memory import in_memory
from weft.plan._moe import ONE_EXPERT, PARTS, RENAMED, TRANSPOSED, TURNED_ON_DISK
from weft.plan._targets import CONV1D_MODELS, CONV1D_MODULES
from weft.plan._tied import has_row_for_each
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.specs import Shape
    from weft.plan._views import View

# A matrix with fewer rows or columns is as small as its factors, if not smaller.
_THIN = 8
_HEADS = ("lm_head", "embed_out", "output_projection", "decoder", "score", "classifier")
# Routers are modules of their own kind in transformers, which LoRA has no layer for.
_ROUTERS = ("gate", "router", "wg", "gate_linear")
# Architecture's model type -> what transformers puts before the names of the bare model's files.
_BARE = {
    **dict.fromkeys(("gpt2", "bloom", "gpt_neo", "gptj", "falcon"), "transformer."),
    **{name: f"{name}." for name in ("bert", "roberta", "distilbert", "electra")},
}


@dataclass(frozen=True, slots=True)
class Form:
    """How LoRA takes a tensor.

    Attributes:
        kind: `linear`, `conv1d`, `embedding`, `kernel`, `experts`, or `none` for no way.
        count: How many matrices it is.
        rows, columns: Of each, as it is stored.
        turned: A belongs to the rows and B to the columns.
        why: Why there is no way.
    """

    kind: str
    count: int = 1
    rows: int = 0
    columns: int = 0
    turned: bool = False
    why: str = ""

    @property
    def full_rank(self) -> int:
        return min(self.rows, self.columns)

    def numbers(self, rank: int) -> int:
        """How many numbers the factors have."""
        return self.count * rank * (self.rows + self.columns)


class Forms:
    """The forms of the tensors of one model."""

    def __init__(self, base: View) -> None:
        self.base = base
        parts = [base.config, *(v for v in base.config.values() if isinstance(v, dict))]
        self.types = {str(part["model_type"]) for part in parts if part.get("model_type")}
        self.experts = next(
            (
                value
                for key in ("num_experts", "num_local_experts", "n_routed_experts")
                if isinstance(value := config_value(dict(base.config), key), int)
            ),
            None,
        )
        architecture = (base.config.get("architectures") or [""])[0] or ""
        headed = "For" in architecture or architecture.endswith("LMHeadModel")
        prefix = next((_BARE[kind] for kind in sorted(self.types) if kind in _BARE), "")
        known = any(name.startswith(prefix) for name in base.tensors)
        self.prefix = prefix if headed and not known else ""
        # Only where the experts are fused in memory: others kept the name of the module.
        self._moved = any(ONE_EXPERT.match(name.removesuffix(".weight")) for name in base.tensors)

    @property
    def conv1d(self) -> bool:
        """The layers of the model are transformers' Conv1D."""
        return bool(self.types & CONV1D_MODELS)

    def path(self, name: str) -> str:
        """The parameter `name` of the files, in the model that transformers makes."""
        head = name.split(".")[0] in _HEADS
        path = in_memory(name if head else self.prefix + name, self.base.config)
        for new, old in RENAMED if self._moved else ():
            path = path.replace(f".{old}.", f".{new}.")
        return path

    def form(self, name: str, shape: Shape, dtype: str) -> Form:
        """How LoRA takes the tensor `name`."""
        module, _, parameter = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        if dtype not in WEIGHTS:
            return Form("none", why=f"it is {dtype}")
        if len(shape) == 3 and parameter in PARTS and leaf.endswith("experts"):
            turned = bool(self.types & (TRANSPOSED | TURNED_ON_DISK))
            return Form("experts", *shape, turned)
        if parameter != "weight" or len(shape) < 2:
            return Form("none", why="it is no matrix")
        if len(shape) == 4 and shape[1] > 1:
            columns = shape[1] * shape[2] * shape[3]
            return _unless_thin(Form("kernel", 1, shape[0], columns))
        if len(shape) != 2:
            return Form("none", why=f"it has {len(shape)} dimensions")
        if leaf in _ROUTERS and shape[0] == self.experts:
            return Form("none", why="it is a router, which PEFT has no LoRA for")
        if self.is_table(name, shape) and leaf not in _HEADS:
            return Form("embedding", 1, *shape, True)
        if ("emb" in leaf and leaf not in _HEADS) or leaf in ("wpe", "wte"):
            return Form("none", why="it is an embedding of something other than tokens")
        if self.conv1d:
            if leaf not in CONV1D_MODULES:
                return Form("none", why="PEFT has one fan_in_fan_out, and Conv1D needs it")
            return Form("conv1d", 1, *shape, True)
        return _unless_thin(Form("linear", 1, *shape))

    def is_table(self, name: str, shape: Shape) -> bool:
        """One row per token."""
        return name.endswith(".weight") and has_row_for_each(self.base.vocabulary, name, shape)


def _unless_thin(form: Form) -> Form:
    if form.full_rank < _THIN:
        return Form("none", why=f"{form.rows} × {form.columns} is as small as its factors")
    return form


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's name of what the model does, where it is one that adds nothing to what is loaded.

    (For classifiers PEFT takes heads to be saved in full, and would look for them in the file.)
    """
    architecture = (config.get("architectures") or [""])[0] or ""
    if config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM" if architecture.endswith("ForConditionalGeneration") else None
    return "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None
