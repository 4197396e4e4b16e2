"""Models of a few thousand weights, for old and new releases of PEFT alike, and for the tests.

They are plain torch, so that what they compute does not depend on the release of transformers.
`llama` and `llama-tied` are the exception: what PEFT saves of embeddings, and where it puts the
adapter, depends on methods that only transformers' models have.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

ROWS, HIDDEN, WIDE, EXPERTS = 20, 16, 24, 3


class Config(dict[str, Any]):
    """What PEFT asks of `model.config`; releases before 0.6 do not do without."""

    def __init__(self, model_type: str) -> None:
        super().__init__(model_type=model_type, _name_or_path=None)  # 0.7 reads both
        self.model_type = model_type

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


class Attention(nn.Module):
    """Square matrices and others, with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, WIDE, bias=False)
        self.k_proj = nn.Linear(HIDDEN, WIDE, bias=False)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q_proj(x) @ self.k_proj(x).transpose(-1, -2) / 5).softmax(-1)
        out: Tensor = self.o_proj(weights @ self.v_proj(x))
        return out


class Feedforward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(HIDDEN, WIDE)
        self.down_proj = nn.Linear(WIDE, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.up_proj(x).tanh())
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.self_attn = Attention()
        self.mlp = Feedforward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(x)
        return out


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(ROWS, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out


class Decoder(nn.Module):
    """Modules with the names of a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config("corpus")
        self.model = Stack(layers=2)
        self.lm_head = nn.Linear(HIDDEN, ROWS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.model(tokens))
        return out

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Block(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.attn = nn.Module()
        self.attn.c_attn = Conv1D(3 * HIDDEN, HIDDEN)
        self.attn.c_proj = Conv1D(HIDDEN, HIDDEN)
        self.ln_1 = nn.LayerNorm(HIDDEN)
        self.mlp = nn.Module()
        self.mlp.c_fc = Conv1D(WIDE, HIDDEN)
        self.mlp.c_proj = Conv1D(HIDDEN, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.c_attn(self.ln_1(x)).chunk(3, -1)
        x = x + self.attn.c_proj((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v)
        out: Tensor = x + self.mlp.c_proj(self.mlp.c_fc(x).tanh())
        return out


class Gpt2(nn.Module):
    """transformers' Conv1D, whose weight is stored (in, out); one of them is square."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config("gpt2")
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(ROWS, HIDDEN)
        self.transformer.h = nn.ModuleList([Block()])
        self.lm_head = nn.Linear(HIDDEN, ROWS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer.wte(tokens)
        for block in self.transformer.h:
            x = block(x)
        out: Tensor = self.lm_head(x)
        return out


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config("corpus")
        self.conv1 = nn.Conv1d(4, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.point = nn.Conv2d(12, 8, 1)
        self.conv3 = nn.Conv3d(2, 4, 3, padding=1)
        self.head = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (batch, 4, 12) -> (batch, 8)."""
        x = self.conv1(x).tanh().unflatten(2, (4, 3))
        x = self.point(self.conv2(x).tanh()).tanh()
        x = self.conv3(x.unflatten(1, (2, 4))).tanh()
        out: Tensor = self.head(x.mean(1).flatten(1))
        return out


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config("corpus")
        self.mha = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.head = nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (batch, 4, 16) -> (batch, 4, 8)."""
        out: Tensor = self.head(self.mha(x, x, x, need_weights=False)[0])
        return out


class Fused(nn.Module):
    """Fused experts: (E, out, in), or (E, in, out) as those of gpt-oss are."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = ((2 * WIDE, HIDDEN), (HIDDEN, WIDE))
        if is_transposed:
            shapes = tuple(shape[::-1] for shape in shapes)  # type: ignore[assignment]
        self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, *shapes[0]))
        self.down_proj = nn.Parameter(torch.zeros(EXPERTS, *shapes[1]))

    def forward(self, x: Tensor) -> Tensor:
        """`x` (tokens, hidden): the sum over all experts."""
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        gate, value = (x @ up).chunk(2, -1)
        return (gate.tanh() * value @ down).sum(0)


class Mixture(nn.Module):
    def __init__(self, model_type: str, *, is_transposed: bool) -> None:
        super().__init__()
        self.config = Config(model_type)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(ROWS, HIDDEN)
        layer = nn.Module()
        layer.mlp = nn.Module()
        layer.mlp.experts = Fused(is_transposed=is_transposed)
        self.model.layers = nn.ModuleList([layer])
        self.lm_head = nn.Linear(HIDDEN, ROWS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = x + layer.mlp.experts(x.flatten(0, 1)).view_as(x)
        out: Tensor = self.lm_head(x)
        return out


# ----------------------------------------------------------------------------------------- bases


def tokens() -> Tensor:
    """Every row of the embedding is used."""
    return (torch.arange(20) * 7 % ROWS).reshape(2, 10)


def signals(*shape: int) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()) * 5 % 17 / 8 - 1).reshape(shape)


def arithmetic() -> str:
    """A digest of sums in float32, of which the last bits differ from one machine to another."""
    a = (torch.arange(576) * 37 % 101).reshape(24, 24) / 101
    made = [a @ a, a.norm(dim=0), a.norm(dim=1), a.sum(1), a.exp(), torch.fft.ifft2(a).real]
    made += [torch.linalg.solve(a + torch.eye(24), a), *torch.linalg.svd(a)]
    return digest(torch.cat([value.flatten() for value in made]))


def digest(value: Tensor) -> str:
    raw = value.detach().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Model:
    """A base.

    Attributes:
        build: Makes it, without its values; None for a model of transformers.
        inputs: Makes what it is given.
        config: `config.json`.
    """

    build: Callable[[], nn.Module] | None
    inputs: Callable[[], Tensor]
    config: dict[str, Any]

    def load(self, folder: Path | str, **kwargs: Any) -> Any:
        """The model with the values in `folder`, in their dtype, all of them and no others."""
        if self.build is None:
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
        from safetensors.torch import load_file

        tensors = load_file(f"{folder}/model.safetensors")
        model = self.build().to(next(iter(tensors.values())).dtype)
        model.load_state_dict(tensors)
        return model.eval()

    def compute(self, model: nn.Module) -> Tensor:
        """What `model` makes of the fixed input, in the dtype that it has."""
        inputs = self.inputs()
        if inputs.is_floating_point():
            inputs = inputs.to(next(model.parameters()).dtype)
        with torch.no_grad():
            out = model(inputs)
        result: Tensor = getattr(out, "logits", out).detach()
        if result.dim() == 3:  # a sum over the positions: the corpus is small
            weights = torch.arange(1, result.shape[1] + 1, dtype=result.dtype) / result.shape[1]
            result = torch.einsum("bto,t->bo", result, weights)
        return result.contiguous()


# Fields that every release of transformers reads alike.
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": ROWS,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

MODELS = {
    "decoder": Model(Decoder, tokens, {"model_type": "corpus"}),
    "gpt2": Model(Gpt2, tokens, {"model_type": "gpt2"}),
    "conv": Model(Convolutions, lambda: signals(2, 4, 12), {"model_type": "corpus"}),
    "mha": Model(Multihead, lambda: signals(2, 4, HIDDEN), {"model_type": "corpus"}),
    "experts": Model(
        lambda: Mixture("mixtral", is_transposed=False), tokens, {"model_type": "mixtral"}
    ),
    "experts-transposed": Model(
        lambda: Mixture("gpt_oss", is_transposed=True), tokens, {"model_type": "gpt_oss"}
    ),
    "llama": Model(None, tokens, {**_LLAMA, "tie_word_embeddings": False}),
    "llama-tied": Model(None, tokens, {**_LLAMA, "tie_word_embeddings": True}),
}
