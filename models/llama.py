"""Llama, Mistral, Qwen and SmolLM: the dense decoders of the Llama family (Touvron et al. 2023).

Modules have the names of Hugging Face's, so that weights and adapters of both need no table:

    x = embed_tokens[idx]
    per layer    h = rms(x, input_layernorm)
                 x += o_proj(attention(rope(q_proj h), rope(k_proj h), v_proj h))
                 h = rms(x, post_attention_layernorm)
                 x += down_proj(silu(gate_proj h) * up_proj h)
    logits = lm_head(rms(x, norm))

Qwen3 normalizes queries and keys before the rope. B is the batch, T the tokens in a row, C the
width, D the size of a head.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora import grouped_linear
from lora.linear import Made, made
from models.language_model import Family, LanguageModel, StoredTensor, in_float32
from ops.activations import swiglu
from ops.attention import KeyValueCache, Lengths, causal_attention
from ops.dropout import dropout as apply_dropout
from ops.norms import rms_norm
from ops.rope import rotated


@dataclass(frozen=True)
class Sizes:
    """The sizes and options of a model of the Llama family.

    Attributes:
        n_kv_head: heads of keys and values; each of them serves n_head / n_kv_head queries.
        rope: the table `rope_parameters` of config.json, with `rope_type` and `rope_theta`.
        max_positions: the context of the published model, which some kinds of rope need;
            `block_size` is less where attention has a sliding window.

    Raises ValueError when `n_head` is not divisible by `n_kv_head`, `head_dim` is odd, `norm_eps`
    is not between 0 and 1, or `rope` is of a kind or has a number that is not supported.
    """

    vocab_size: int
    n_embd: int
    block_size: int
    n_head: int
    n_layer: int
    n_kv_head: int
    head_dim: int
    n_inner: int
    max_positions: int
    norm_eps: float = 1e-6
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False

    def __post_init__(self) -> None:
        if self.n_head % self.n_kv_head != 0:
            raise ValueError(f"{self.n_head} heads do not share {self.n_kv_head} of keys evenly")
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim={self.head_dim} is odd, which rope cannot turn")
        if type(self.norm_eps) is not float or not 0 < self.norm_eps < 1:
            raise ValueError(f"rms_norm_eps is {self.norm_eps!r}, not a number between 0 and 1")
        check_rope(self.rope)


class Llama(LanguageModel):
    """A model of the Llama family.

    The arguments are those of `Sizes`; `LanguageModel.adapt` puts LoRA on it. Dropout is on the
    attention's weights and on what each half of a block adds to the residual stream.
    """

    linears = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    )  # fmt: skip

    def __init__(self, *, device: str | torch.device, dropout: float = 0.0, **sizes: Any) -> None:
        super().__init__()
        self.sizes = s = Sizes(**sizes)
        self.model = nn.Module()  # for the names in it, which begin with "model."
        self.model.embed_tokens = nn.Embedding(s.vocab_size, s.n_embd)
        self.model.layers = nn.ModuleList(Block(s, dropout) for _ in range(s.n_layer))
        self.model.norm = RMSNorm(s.n_embd, s.norm_eps)
        self.lm_head = nn.Linear(s.n_embd, s.vocab_size, bias=False)
        self.frequencies: dict[torch.device, tuple[Tensor, float]] = {}  # of rope
        if s.tied_head:
            self.tie_head(copied=False)
        self.to(device)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    def embedding_tables(self) -> list[nn.Embedding]:
        return [self.model.embed_tokens]

    def embed(self, idx: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """x (B, T, C), and the cosines and sines of rope, each (T, 1, D/2) or
        (B, T, 1, D/2)."""
        x = in_float32(self.model.embed_tokens(idx))
        if idx.device not in self.frequencies:
            frequencies, factor = rope_frequencies(self.sizes)
            self.frequencies[idx.device] = (frequencies.to(idx.device), factor)
        frequencies, factor = self.frequencies[idx.device]
        angles = (positions[..., None].float() * frequencies)[..., None, :]  # (..., T, 1, D/2)
        return x, angles.cos() * factor, angles.sin() * factor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rope and grouped queries (Su et al. 2021; Ainslie et al. 2023)."""

    def __init__(self, s: Sizes, dropout: float) -> None:
        super().__init__()
        self.head_dim, self.dropout = s.head_dim, dropout
        self.q_proj = nn.Linear(s.n_embd, s.n_head * s.head_dim, bias=s.qkv_bias)
        self.k_proj = nn.Linear(s.n_embd, s.n_kv_head * s.head_dim, bias=s.qkv_bias)
        self.v_proj = nn.Linear(s.n_embd, s.n_kv_head * s.head_dim, bias=s.qkv_bias)
        self.o_proj = nn.Linear(s.n_head * s.head_dim, s.n_embd, bias=s.out_bias)
        self.q_norm = RMSNorm(s.head_dim, s.norm_eps) if s.qk_norm else None
        self.k_norm = RMSNorm(s.head_dim, s.norm_eps) if s.qk_norm else None

    def forward(
        self,
        x: Made,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None,
        mask: Tensor | Lengths | None,
    ) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim))  # (B, T, heads, D)
            for t in grouped_linear(x, [self.q_proj, self.k_proj, self.v_proj])
        )
        if self.q_norm is not None:  # whose weights are float32 under autocast too
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = causal_attention(q, k, v, self.dropout, self.training, mask, cache, saves_memory=True)
        (y,) = grouped_linear(y, [self.o_proj])
        return y


class MLP(nn.Module):
    """A gated MLP (Shazeer 2020)."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.n_embd, s.n_inner, bias=s.mlp_bias)
        self.up_proj = nn.Linear(s.n_embd, s.n_inner, bias=s.mlp_bias)
        self.down_proj = nn.Linear(s.n_inner, s.n_embd, bias=s.mlp_bias)

    def forward(self, x: Made) -> Tensor:
        gate, up = grouped_linear(x, [self.gate_proj, self.up_proj])  # (B, T, n_inner) each
        (y,) = grouped_linear(made(swiglu, gate, up), [self.down_proj])
        return y


class Block(nn.Module):
    """Attention, then MLP, each on a normalized copy of the residual stream (B, T, C)."""

    def __init__(self, s: Sizes, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm = RMSNorm(s.n_embd, s.norm_eps)
        self.self_attn = Attention(s, dropout)
        self.post_attention_layernorm = RMSNorm(s.n_embd, s.norm_eps)
        self.mlp = MLP(s)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        mask: Tensor | Lengths | None = None,
    ) -> Tensor:
        y = self.self_attn(made(self.input_layernorm, x), cos, sin, cache, mask)
        x = x + apply_dropout(y, self.dropout, self.training)
        y = self.mlp(made(self.post_attention_layernorm, x))
        return x + apply_dropout(y, self.dropout, self.training)


# ---- rope

ROPE_NUMBERS = {  # what each kind needs
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
}  # fmt: skip
YARN_OPTIONS = (
    "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim",
    "beta_fast", "beta_slow",
)  # fmt: skip


def check_rope(rope: dict[str, Any]) -> None:
    """Raise ValueError for a table of rope that `rope_frequencies` does not compute as stated."""
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        raise ValueError(
            f"rope of type {shortened(kind)} is not supported, only {', '.join(ROPE_NUMBERS)}"
        )
    if rope.get("mrope_section") is not None:
        raise ValueError("rope has mrope_section, supported is one position for each token")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rope has a partial_rotary_factor, supported is rope of whole heads")
    options = [name for name in YARN_OPTIONS if kind == "yarn" and rope.get(name)]
    for name in ("rope_theta", *ROPE_NUMBERS[kind], *options):
        value, least = rope.get(name), 1 if name == "rope_theta" else 0
        if type(value) not in (int, float) or not least < value < 1e18:
            raise ValueError(f"{name} of rope is {shortened(value)}, not a number above {least}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError("low_freq_factor of rope is not below high_freq_factor")
    if kind == "yarn" and type(rope.get("truncate", True)) is not bool:
        raise ValueError(f"truncate of rope is {shortened(rope['truncate'])}, not true or false")


def shortened(value: Any) -> str:
    """A value of a config for an error of one line, whatever its length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def rope_frequencies(s: Sizes) -> tuple[Tensor, float]:
    """The angle of each pair per position, (D / 2,) float32, and a factor on cosines and sines.

    Kinds: `default` (Su et al. 2021), `linear` (Chen et al. 2023), `dynamic`, which is as default
    up to the published context, `llama3` (Llama 3.1), `yarn` (Peng et al. 2023).
    """
    rope, D = s.rope, s.head_dim
    theta, kind = rope["rope_theta"], rope["rope_type"]
    frequencies = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D)
    if kind == "linear":
        return frequencies / rope["factor"], 1.0
    if kind == "llama3":
        old = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wavelengths = 2 * math.pi / frequencies
        smooth = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies, 1.0
    if kind == "yarn":
        return yarn_frequencies(frequencies, rope, D, s.max_positions)
    return frequencies, 1.0


def yarn_frequencies(
    frequencies: Tensor, rope: dict[str, Any], D: int, max_positions: int
) -> tuple[Tensor, float]:
    """Frequencies between stretched, where a pair turns seldom, and plain, where it turns often."""
    old = rope.get("original_max_position_embeddings") or max_positions
    factor = rope["factor"]

    def pair_that_turns(times: float) -> float:
        return D * math.log(old / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = (
        pair_that_turns(rope.get(n) or d) for n, d in (("beta_fast", 32), ("beta_slow", 1))
    )
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    ramp = (torch.arange(D // 2).float() - low) / ((high - low) or 0.001)
    plain = 1 - ramp.clamp(0, 1)
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        if mscale and mscale_all:
            attention_factor = yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all)
        else:
            attention_factor = yarn_scale(factor, 1.0)
    stretched = frequencies / factor
    return stretched * (1 - plain) + frequencies * plain, float(attention_factor)


def yarn_scale(factor: float, mscale: float) -> float:
    """YaRN's factor on cosines and sines for a context that is `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


# ---- Hugging Face's folders

# What an absent num_key_value_heads means; None is as many as the query's, as null is for all.
DEFAULT_KV_HEADS = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}
LAYER_TYPES = ("full_attention", "sliding_attention")
LARGEST = 2**24  # of the sizes, so that no product of two is beyond a tensor's


def read_config(config: dict[str, Any]) -> Sizes:
    """The sizes that a config.json of the family states. Raises ValueError for what is not
    supported."""
    kind = config["model_type"]
    if config.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config says that the weights are quantized, which is not supported; "
            "accepted: weights in float32, bfloat16 or float16"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported, only 'silu'")
    n_embd, n_head = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    n_layer = _whole(config, "num_hidden_layers")
    max_positions = _whole(config, "max_position_embeddings")
    kv_heads = config.get("num_key_value_heads", DEFAULT_KV_HEADS[kind])
    if kv_heads is None:
        kv_heads = n_head
    head_dim = config.get("head_dim")
    if head_dim is None:
        if kind != "qwen3" and n_embd % n_head != 0:
            raise ValueError("hidden_size is not a multiple of num_attention_heads")
        head_dim = 128 if kind == "qwen3" else n_embd // n_head
    sizes = {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    sizes["num_attention_heads * head_dim"] = n_head * _whole(sizes, "head_dim")
    _whole(sizes, "num_attention_heads * head_dim")
    window = _sliding_window(config, n_layer)
    return Sizes(
        vocab_size=_whole(config, "vocab_size"),
        n_embd=n_embd,
        block_size=max_positions if window is None else min(max_positions, window),
        n_head=n_head,
        n_layer=n_layer,
        n_kv_head=_whole(sizes, "num_key_value_heads"),
        head_dim=head_dim,
        n_inner=_whole(config, "intermediate_size"),
        max_positions=max_positions,
        norm_eps=config.get("rms_norm_eps"),
        rope=_rope(config),
        qkv_bias=kind == "qwen2" or (kind != "mistral" and _flag(config, "attention_bias")),
        out_bias=kind in ("llama", "qwen3") and _flag(config, "attention_bias"),
        mlp_bias=kind == "llama" and _flag(config, "mlp_bias"),
        qk_norm=kind == "qwen3",
        tied_head=_flag(config, "tie_word_embeddings"),
    )


def _whole(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise ValueError(f"{name} is {shortened(value)}, not a whole number from 1 to {LARGEST}")
    return value


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name)
    if type(value) is not bool and value is not None:
        raise ValueError(f"{name} is {shortened(value)}, neither true nor false")
    return bool(value)


def _sliding_window(config: dict[str, Any], n_layer: int) -> int | None:
    """How many tokens up to itself a token sees in layers with a window; None where all see all."""
    kind = config["model_type"]
    if kind == "llama":
        return None
    window = config.get("sliding_window", 4096)
    if kind != "mistral":
        first, layers = config.get("max_window_layers", 28), config.get("layer_types")
        if layers is None:
            if type(first) is not int:
                raise ValueError(f"max_window_layers is {shortened(first)}, not a whole number")
            slides = first < n_layer
        else:
            if not isinstance(layers, list) or any(layer not in LAYER_TYPES for layer in layers):
                raise ValueError(
                    f"layer_types is {shortened(layers)}, supported are {', '.join(LAYER_TYPES)}"
                )
            slides = "sliding_attention" in layers
        if not _flag(config, "use_sliding_window") or not slides:
            return None
    return None if window is None else _whole({"sliding_window": window}, "sliding_window")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The table of rope, with its `rope_type` and `rope_theta`, wherever they stand."""
    # Of two tables transformers takes the older files'.
    table = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(table, dict):
        raise ValueError(f"the parameters of rope are {shortened(table)}, not a table")
    table = {name: value for name, value in table.items() if value is not None}
    if any(isinstance(value, dict) for value in table.values()):
        raise ValueError("rope has a table for each kind of layer, supported is one for all")
    outside = {"rope_theta": 10000.0} | {  # the default of all four model types
        name: config[name]
        for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        if config.get(name) is not None
    }
    if "original_max_position_embeddings" in outside:  # which has precedence where it stands there
        table.pop("original_max_position_embeddings", None)
    kind = table.pop("type", "default")
    return outside | {"rope_type": kind} | table


def layout(s: Sizes) -> list[StoredTensor]:
    """All tensors of a model of these sizes, under Hugging Face's names, which are ours."""
    C, V, D = s.n_embd, s.vocab_size, s.head_dim
    q, kv = s.n_head * D, s.n_kv_head * D
    linears = {
        "self_attn.q_proj": (q, C, s.qkv_bias),
        "self_attn.k_proj": (kv, C, s.qkv_bias),
        "self_attn.v_proj": (kv, C, s.qkv_bias),
        "self_attn.o_proj": (C, q, s.out_bias),
        "mlp.gate_proj": (s.n_inner, C, s.mlp_bias),
        "mlp.up_proj": (s.n_inner, C, s.mlp_bias),
        "mlp.down_proj": (C, s.n_inner, s.mlp_bias),
    }
    norms = {"input_layernorm": C, "post_attention_layernorm": C}
    if s.qk_norm:
        norms |= {"self_attn.q_norm": D, "self_attn.k_norm": D}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, C)}
    for i in range(s.n_layer):
        layer = f"model.layers.{i}"
        for name, (n_out, n_in, bias) in linears.items():
            shapes[f"{layer}.{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (n_out,)
        shapes |= {f"{layer}.{name}.weight": (width,) for name, width in norms.items()}
    shapes["model.norm.weight"] = (C,)
    if not s.tied_head:
        shapes["lm_head.weight"] = (V, C)
    return [StoredTensor(name, (name,), shape) for name, shape in shapes.items()]


FAMILY = Family(
    name="llama",
    model=Llama,
    sizes=Sizes,
    model_types=tuple(DEFAULT_KV_HEADS),
    read_config=read_config,
    layout=layout,
    ignored=lambda name: name.endswith(".rotary_emb.inv_freq"),  # of old files
)
