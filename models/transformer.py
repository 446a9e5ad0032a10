"""The transformer's parts: causal attention, MLP, block (GPT-2's pre-norm design)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import grouped_linear
from lora.dropout import draw_numbers, dropout, mask_of
from lora.linear import concatenated, differentiable_once, scaled_product

# On a CPU the plain form of attention beats torch's fused one where it has dropout, and in bfloat16
# up to this context length.
PLAIN_ATTENTION_MAX_CONTEXT = 256

# The plain form takes so many queries at a time, with the keys up to the last of them: what is
# masked beyond is neither computed nor kept.
QUERIES = 64


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


def causal_attention(
    qkv: Tensor,
    dropout_p: float,
    training: bool,
    mask: Tensor | None = None,
    cache: KeyValueCache | None = None,
) -> Tensor:
    """Causal scaled dot-product attention, from queries, keys and values side by side in
    qkv (B, T, 3, H, D): (B, T, H * D).

    `mask` (B, 1, T, T) is 0 where a query sees a key, none of them after it, and else -inf; None
    lets it see all before it. With a `cache`, keys and values join those in it: all of them are
    seen by a single query.
    """
    B, T, _, H, D = qkv.shape
    dropout_p = dropout_p if training else 0.0
    if (
        qkv.device.type == "cpu"
        and cache is None
        and (dropout_p > 0.0 or (qkv.dtype == torch.bfloat16 and T <= PLAIN_ATTENTION_MAX_CONTEXT))
    ):
        return plain_attention(qkv, dropout_p, mask)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # (B, H, T, D) each
    if cache is not None:
        k, v = cache.append(k, v)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None and T > 1
    )
    return y.transpose(1, 2).reshape(B, T, H * D)


def plain_attention(qkv: Tensor, dropout_p: float, mask: Tensor | None = None) -> Tensor:
    """The same as batched products with a softmax between them."""
    return _PlainAttention.apply(qkv, dropout_p, mask)


class _PlainAttention(torch.autograd.Function):
    """Left to autograd it would keep three tensors of the size of the scores; this keeps one and
    the dropout's random numbers."""

    @staticmethod
    def forward(ctx, qkv: Tensor, dropout_p: float, mask: Tensor | None) -> Tensor:
        B, T, _, H, D = qkv.shape
        packed = qkv.permute(2, 0, 3, 1, 4).reshape(3, B * H, T, D)
        q, k, v = packed
        ctx.lowest, ctx.kept = 0, 1.0
        outputs, saved = [], []
        for start in range(0, T, QUERIES):
            end = min(start + QUERIES, T)
            if mask is None:
                seen = torch.full((end - start, end), -math.inf, dtype=qkv.dtype, device=qkv.device)
                seen.triu_(start + 1)
            else:
                seen = mask[:, :, start:end, :end].expand(B, H, -1, -1).flatten(0, 1)
            scores = torch.baddbmm(seen, q[:, start:end], k[:, :end].mT, alpha=1 / math.sqrt(D))
            weights = F.softmax(scores, dim=-1)  # (B * H, queries, keys)
            numbers, dropped = None, weights
            if dropout_p > 0.0:
                numbers, ctx.lowest, ctx.kept = draw_numbers(weights, dropout_p)
                dropped = mask_of(numbers, ctx.lowest, out=torch.empty_like(weights)).mul_(weights)
            outputs.append(scaled_product(1 / ctx.kept, dropped, v[:, :end]))
            saved += [weights, numbers]
        ctx.save_for_backward(packed, *saved)
        y = concatenated(outputs)  # (B * H, T, D)
        return y.view(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        packed, *saved = ctx.saved_tensors
        q, k, v = packed
        B, (T, D) = len(grad), q.shape[1:]
        g = grad.view(B, T, -1, D).transpose(1, 2).reshape(q.shape)
        scaling = 1 / math.sqrt(D) / ctx.kept
        d_queries = []
        # From the last queries, which see all keys, to the first.
        for i in reversed(range(len(saved) // 2)):
            weights, numbers = saved[2 * i : 2 * i + 2]
            start, end = i * QUERIES, min((i + 1) * QUERIES, T)
            d_weights = g[:, start:end] @ v[:, :end].mT
            dropped = weights
            if numbers is not None:
                dropped = mask_of(numbers, ctx.lowest, out=torch.empty_like(weights))
                d_weights.mul_(dropped)
                dropped.mul_(weights)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dv_part = scaled_product(1 / ctx.kept, dropped.mT, g[:, start:end])
            dk_part = scaled_product(scaling, d_scores.mT, q[:, start:end])
            d_queries.append(scaled_product(scaling, d_scores, k[:, :end]))
            if end == T:
                dk, dv = dk_part, dv_part
            else:
                dk[:, :end] += dk_part
                dv[:, :end] += dv_part
        dq = concatenated(d_queries[::-1])
        d_qkv = [t.view(B, -1, T, D).transpose(1, 2) for t in (dq, dk, dv)]  # (B, T, H, D) each
        return torch.stack(d_qkv, 2), None, None


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
        qkv = grouped_linear(x, [self.query, self.key, self.value])  # (B, T, 3C)
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head)
        y = causal_attention(qkv, self.dropout, self.training, mask, cache)  # (B, T, C)
        return dropout(self.proj(y), self.dropout, self.training)


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
