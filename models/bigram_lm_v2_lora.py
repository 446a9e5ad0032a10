"""BigramLanguageModelLoRA: a GPT-2-style language model, trained whole or through LoRA adapters.

It began as a bigram table and kept the name. It is a transformer decoder of GPT-2's kind (Radford
et al. 2019). The end of this file says how Hugging Face's folders hold GPT-2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import grouped_linear
from lora.linear import apply_linear
from models.language_model import Family, LanguageModel, StoredTensor, in_float32
from ops.attention import KeyValueCache, Lengths, causal_attention
from ops.dropout import dropout as apply_dropout

GELUS = ("exact", "tanh")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model of GPT-2's kind.

    Published weights need two options. `gelu` is "exact" or "tanh". With `tied_head` the head's
    weight is that of the token embedding.

    Raises ValueError when `n_embd` is not divisible by `n_head`, and for an unknown `gelu`.
    """

    vocab_size: int
    n_embd: int
    block_size: int
    n_head: int
    n_layer: int
    gelu: str = "exact"
    tied_head: bool = False

    def __post_init__(self) -> None:
        if self.gelu not in GELUS:
            raise ValueError(f"gelu={self.gelu!r} is not one of {', '.join(GELUS)}")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")


class BigramLanguageModelLoRA(LanguageModel):
    """A decoder-only transformer over `vocab_size` tokens and up to `block_size` of context.

    With `use_lora=True` every attention, MLP and lm_head linear is a `LoRALinear`, or those that
    `lora_targets` names (see `lora.add_lora`). Then all base weights are frozen. Adapters train,
    and so do the embeddings unless `train_embeddings` is False.

    `gelu` and `tied_head` are those of `Sizes`. Where LoRA freezes a tied head and trains the
    embedding, they are two tensors that start as one.

    Raises ValueError as `Sizes` does, and for a target that is no linear of the model.
    """

    linears = ("query", "key", "value", "proj", "fc_in", "fc_out", "lm_head")

    def __init__(
        self,
        vocab_size: int,
        n_embd: int,
        block_size: int,
        device: str | torch.device,
        dropout: float,
        n_head: int,
        n_layer: int,
        use_lora: bool = False,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        lora_targets: Sequence[str] | str | None = None,
        train_embeddings: bool = True,
        gelu: str = "exact",
        tied_head: bool = False,
    ) -> None:
        super().__init__()
        self.sizes = Sizes(vocab_size, n_embd, block_size, n_head, n_layer, gelu, tied_head)
        self.dropout = dropout
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, gelu) for _ in range(n_layer))
        self.ln_f = LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.reset_parameters()
        if tied_head:
            self.tie_head(copied=use_lora and train_embeddings)
        if use_lora:
            self.adapt(lora_rank, lora_alpha, lora_dropout, lora_targets, train_embeddings)
        self.to(device)

    def reset_parameters(self) -> None:
        """GPT-2's initialization: normal(0, 0.02), residual projections scaled by depth."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = 0.02
                if name.endswith(("attn.proj", "mlp.fc_out")):
                    std /= math.sqrt(2 * len(self.blocks))
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    @property
    def final_norm(self) -> nn.LayerNorm:
        return self.ln_f

    def embedding_tables(self) -> list[nn.Embedding]:
        return [self.token_embedding_table, self.position_embedding_table]

    def embed(self, idx: Tensor, positions: Tensor) -> tuple[Tensor]:
        x = in_float32(self.token_embedding_table(idx))  # (B, T, C)
        x = x + self.position_embedding_table(positions)
        return (apply_dropout(x, self.dropout, self.training),)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, also of an input in float32 with weights in a lower precision."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with separate key, query, value and proj linears."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.key = nn.Linear(n_embd, n_embd)
        self.query = nn.Linear(n_embd, n_embd)
        self.value = nn.Linear(n_embd, n_embd)
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, mask: Tensor | Lengths | None = None
    ) -> Tensor:
        qkv = grouped_linear(x, [self.query, self.key, self.value])  # (B, T, C) each
        q, k, v = (t.unflatten(-1, (self.n_head, -1)) for t in qkv)  # (B, T, H, D) each
        y = causal_attention(q, k, v, self.dropout, self.training, mask, cache)  # (B, T, C)
        return apply_dropout(apply_linear(self.proj, y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linears with a GELU between them, exact or by GPT-2's approximation with tanh."""

    def __init__(self, n_embd: int, dropout: float, gelu: str) -> None:
        super().__init__()
        self.dropout = dropout
        self.approximate = "none" if gelu == "exact" else gelu
        self.fc_in = nn.Linear(n_embd, 4 * n_embd)
        self.fc_out = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(apply_linear(self.fc_in, x), approximate=self.approximate)  # (B, T, 4C)
        return apply_dropout(apply_linear(self.fc_out, x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each on a normalized copy of the residual stream (B, T, C)."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, gelu: str) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, dropout)
        self.ln_2 = LayerNorm(n_embd)
        self.mlp = MLP(n_embd, dropout, gelu)

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, mask: Tensor | Lengths | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


# ---- GPT-2 in Hugging Face's folders

CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
# Options that change what the model computes, each with the only value that this model computes.
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def read_config(config: dict[str, Any]) -> Sizes:
    """The sizes that a config.json of GPT-2 states. Raises ValueError for what is not supported."""
    sizes = {ours: config.get(theirs) for ours, theirs in CONFIG_KEYS.items()}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{CONFIG_KEYS[name]} is {size!r}, not a size")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"activation_function {activation!r} is not supported, only {', '.join(ACTIVATIONS)}"
        )
    wanted = FIXED | {"n_inner": config.get("n_inner") and 4 * sizes["n_embd"]}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name}={config[name]} is not supported, only {value}")
    tied_head = config.get("tie_word_embeddings", True) is True
    return Sizes(**sizes, gelu=ACTIVATIONS[activation], tied_head=tied_head)


def write_config(sizes: Sizes) -> dict[str, Any]:
    """The config.json of a GPT-2 of these sizes."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    config = {theirs: getattr(sizes, ours) for ours, theirs in CONFIG_KEYS.items()} | FIXED
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    config |= {"activation_function": names[sizes.gelu], "tie_word_embeddings": sizes.tied_head}
    return config


def layout(sizes: Sizes) -> list[StoredTensor]:
    """All tensors of a folder with a GPT-2 of these sizes.

    GPT-2 keeps query, key and value in one matrix, `c_attn`, and the matrices of blocks as
    (in, out).
    """
    C, V, head = sizes.n_embd, sizes.vocab_size, "lm_head.weight"
    T = sizes.block_size
    tensors = [
        StoredTensor("transformer.wte.weight", ("token_embedding_table.weight",), (V, C)),
        StoredTensor("transformer.wpe.weight", ("position_embedding_table.weight",), (T, C)),
        *_weight_and_bias("transformer.ln_f", ["ln_f"], (C,)),
    ]
    for i in range(sizes.n_layer):
        h, block = f"transformer.h.{i}", f"blocks.{i}"
        q_k_v = [f"{block}.attn.{name}" for name in ("query", "key", "value")]
        tensors += _weight_and_bias(f"{h}.ln_1", [f"{block}.ln_1"], (C,))
        tensors += _weight_and_bias(f"{h}.attn.c_attn", q_k_v, (C, 3 * C))
        tensors += _weight_and_bias(f"{h}.attn.c_proj", [f"{block}.attn.proj"], (C, C))
        tensors += _weight_and_bias(f"{h}.ln_2", [f"{block}.ln_2"], (C,))
        tensors += _weight_and_bias(f"{h}.mlp.c_fc", [f"{block}.mlp.fc_in"], (C, 4 * C))
        tensors += _weight_and_bias(f"{h}.mlp.c_proj", [f"{block}.mlp.fc_out"], (4 * C, C))
    return tensors if sizes.tied_head else [*tensors, StoredTensor(head, (head,), (V, C))]


def _weight_and_bias(name: str, ours: list[str], shape: tuple[int, ...]) -> list[StoredTensor]:
    """The two tensors of a folder's module `name`, which holds our modules `ours`."""
    weights, biases = (tuple(f"{o}.{kind}" for o in ours) for kind in ("weight", "bias"))
    return [
        StoredTensor(f"{name}.weight", weights, shape, transposed=len(shape) == 2),
        StoredTensor(f"{name}.bias", biases, shape[-1:]),
    ]


FAMILY = Family(
    name="gpt2",
    model=BigramLanguageModelLoRA,
    sizes=Sizes,
    model_types=("gpt2",),
    read_config=read_config,
    write_config=write_config,
    layout=layout,
    # Published files hold the causal masks of attention.
    ignored=lambda name: name.endswith((".attn.bias", ".attn.masked_bias")),
)
