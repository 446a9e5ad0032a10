"""The transformer's parts: causal attention, MLP, block (GPT-2's pre-norm design)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import grouped_linear
from lora.dropout import dropout

# Up to this context length the plain form of attention beats torch's fused one on a CPU, in
# bfloat16 always and in float32 where attention has dropout.
PLAIN_ATTENTION_MAX_CONTEXT = 256


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, training: bool, mask: Tensor | None = None
) -> Tensor:
    """Causal scaled dot-product attention. q, k, v and the result have shape (B, H, T, D).

    A single query may stand for the last of more keys, all of which it sees. `mask` (B, 1, T, T) is
    0 where a query sees a key and else -inf; None lets it see all before it.
    """
    dropout_p = dropout_p if training else 0.0
    if (
        q.device.type == "cpu"
        and q.shape[2] == k.shape[2] <= PLAIN_ATTENTION_MAX_CONTEXT
        and (q.dtype == torch.bfloat16 or dropout_p > 0.0)
    ):
        return plain_attention(q, k, v, dropout_p, mask)
    is_causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal
    )


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Tensor | None = None
) -> Tensor:
    """The same as two batched products with a softmax between them."""
    B, H, T, D = q.shape
    q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
    if mask is None:
        mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    else:
        mask = mask.expand(B, H, T, T).flatten(0, 1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1.0 / math.sqrt(D))  # (B*H, T, T)
    weights = dropout(F.softmax(scores, dim=-1), dropout_p, training=True)
    return torch.bmm(weights, v).view(B, H, T, D)


class KeyValueCache:
    """The keys and values that one attention layer has computed, each (B, H, T, D)."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next tokens; returns all so far."""
        if self.keys is None:
            B, H, _, D = k.shape
            self.keys = k.new_empty(B, H, self.block_size, D)
            self.values = v.new_empty(B, H, self.block_size, D)
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


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
        self, x: Tensor, cache: KeyValueCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = grouped_linear(x, [self.query, self.key, self.value])  # (B, T, C) each
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        y = causal_attention(q, k, v, self.dropout, self.training, mask)  # (B, H, T, D)
        y = self.proj(y.transpose(1, 2).reshape(B, T, C))
        return dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linears with a GELU between them, exact or by GPT-2's approximation with tanh."""

    def __init__(self, n_embd: int, dropout: float, gelu: str) -> None:
        super().__init__()
        self.dropout = dropout
        self.approximate = "none" if gelu == "exact" else gelu
        self.fc_in = nn.Linear(n_embd, 4 * n_embd)
        self.fc_out = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc_in(x), approximate=self.approximate)  # (B, T, 4C)
        return dropout(self.fc_out(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each on a normalized copy of the residual stream (B, T, C)."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, gelu: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd, dropout, gelu)

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))
