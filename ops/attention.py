"""Causal attention, with as many heads of keys and values as of queries or fewer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dropout import draw_numbers, mask_of
from ops.products import concatenated, differentiable_once, scaled_product

# On a CPU the plain form of attention beats torch's fused one where it has dropout, and in bfloat16
# up to this context length. `python benchmarks/cpu_operations.py` sets this and QUERIES.
PLAIN_ATTENTION_MAX_CONTEXT = 256

# Where weights are computed again in backward, the plain form without dropout is faster up to this
# one: forward and backward of 512 tokens, 32 heads and 8 of keys take 0.73 of the fused form's time
# in float32 and 0.42 in bfloat16, and 1024 tokens 0.87 and 0.63 (an EPYC with AVX-512).
PLAIN_AGAIN_MAX_CONTEXT = 1024

# The plain form takes so many queries at a time, with the keys up to the last of them. Scores of
# later keys, which the mask hides, are neither computed nor kept.
QUERIES = 64

# Longer blocks have no mask: attention is computed for each of the texts that are packed into them.
# `python benchmarks/cpu_operations.py --sections segments` sets the first. A GPU would wait for
# Python, which starts the many small operations; there the mask's memory decides, 32 MiB of a block
# of 4096 tokens in bfloat16.
MASK_MAX_CONTEXT = 128
GPU_MASK_MAX_CONTEXT = 4096

# Whether torch's fused form on a CPU reads one key head for a group of query heads. In earlier
# versions enable_gqa=True takes a form there that keeps all scores.
CPU_TAKES_GROUPS = torch.__version__ >= (2, 9)

# Of segments, which fill the rows of a batch one after the other.
Lengths = list[int]


class KeyValueCache:
    """The keys and values that one attention layer has computed, each (B, K, T, D).

    It has room for up to block_size tokens, and takes memory as they come: a context of 131,072
    tokens is seldom full.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def _grown(self, old: Tensor) -> Tensor:
        """A copy with room for twice the tokens, so that all copies cost as much as one."""
        B, K, n, D = old.shape
        room = min(self.block_size, max(2 * self.length, 128))
        new = old.new_empty(B, K, room, D)
        new[:, :, :n] = old
        return new

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.length = min(self.length, length)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the next tokens, (B, K, T, D) each; returns all so far."""
        start, self.length = self.length, self.length + k.shape[2]
        if self.keys is None:
            self.keys, self.values = k[:, :, :0], v[:, :, :0]
        if self.length > self.keys.shape[2]:
            self.keys, self.values = (self._grown(t) for t in (self.keys, self.values))
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    training: bool,
    mask: Tensor | Lengths | None = None,
    cache: KeyValueCache | None = None,
    saves_memory: bool = False,
) -> Tensor:
    """Causal scaled dot-product attention of queries (B, T, H, D) to keys and values
    (B, T, K, D): (B, T, H * D).

    H is a multiple of K. Groups of H // K query heads share a key head: query head i reads key head
    i // (H // K) (Ainslie et al. 2023, "GQA", arXiv 2305.13245).

    With a `cache`, keys and values join those in it, and the queries are of the last T of its S
    tokens; else S is T. `mask` (B, 1, T, S) is 0 where a query sees a key, none of them after it,
    and else -inf; None lets a query see all keys up to its own. Without a cache `mask` can be the
    lengths of segments, none of which is in two rows: a query sees the keys of its own alone.

    With `saves_memory` the weights of the plain form on a CPU are computed again in backward, which
    makes it the one of choice for more tokens.

    Raises ValueError where H is not a multiple of K.
    """
    B, T, H, D = q.shape
    K = k.shape[2]
    if H % K != 0:
        raise ValueError(f"{H} heads of queries are not a multiple of {K} heads of keys")
    if B == 0:  # a process's share of a small batch
        return q.reshape(B, T, H * D)
    if isinstance(mask, list):
        # Each (1, tokens, H or K, D). Backward puts the gradients of all together at once.
        segments = zip(*(t.flatten(0, 1)[None].split(mask, 1) for t in (q, k, v)), strict=True)
        options = {"saves_memory": saves_memory}
        y = [causal_attention(*segment, dropout_p, training, **options) for segment in segments]
        return torch.cat(y, 1).view(B, T, H * D)
    dropout_p = dropout_p if training else 0.0
    if q.device.type == "cpu" and cache is None:
        again = saves_memory and T <= PLAIN_AGAIN_MAX_CONTEXT and torch.is_grad_enabled()
        short = q.dtype == torch.bfloat16 and T <= PLAIN_ATTENTION_MAX_CONTEXT
        if dropout_p > 0.0 or short or again:
            return plain_attention(q, k, v, dropout_p, mask, keeps_weights=not saves_memory)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if cache is not None:
        k, v = cache.append(k, v)
    S = k.shape[2]
    if mask is None and 1 < T < S:  # is_causal=True would take the queries for the first T tokens
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril_(S - T)
    grouped = {}
    if K < H and T == 1 and mask is None:
        # All see the same keys, so a group is as good as so many queries of one head.
        q = q.reshape(B, K, H // K, D)
    elif K < H and _fused_form_takes_groups(q, mask):
        grouped = {"enable_gqa": True}
    elif K < H:
        k, v = (t.repeat_interleave(H // K, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal=mask is None and T > 1, **grouped
    )
    return y.reshape(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)


def _fused_form_takes_groups(q: Tensor, mask: Tensor | None) -> bool:
    """Whether enable_gqa=True leaves torch its fused form.

    On CUDA only the kernel without masks and float32 takes groups (FlashAttention).
    """
    if q.device.type == "cpu":
        return CPU_TAKES_GROUPS
    return q.device.type == "cuda" and q.dtype == torch.bfloat16 and mask is None


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    mask: Tensor | None = None,
    keeps_weights: bool = True,
) -> Tensor:
    """Causal attention without a cache, as batched products with a softmax between them.

    `dropout_p` is applied whatever the mode. Shapes and `mask` are those of `causal_attention`. The
    softmax is computed again in backward unless it `keeps_weights`.
    """
    return _PlainAttention.apply(q, k, v, dropout_p, mask, keeps_weights)


class _PlainAttention(torch.autograd.Function):
    """Attention that keeps one tensor of the size of the scores, and the dropout's random numbers.

    Autograd would keep three such tensors. A group of G = H // K query heads is one product with
    its key head. Its rows are ordered by token, and by head within a token, so that the rows of
    successive tokens lie together.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        mask: Tensor | None,
        keeps_weights: bool,
    ) -> Tensor:
        B, T, H, D = q.shape
        K = k.shape[2]
        G = H // K
        q = q.unflatten(2, (K, G)).transpose(1, 2).reshape(B * K, T * G, D)
        k, v = (t.transpose(1, 2).reshape(B * K, T, D) for t in (k, v))
        ctx.lowest, ctx.kept = 0, 1.0
        outputs, saved = [], []
        for start in range(0, T, QUERIES):
            end = min(start + QUERIES, T)
            weights = _weights(q, k, mask, start, end)
            numbers, dropped = None, weights
            if dropout_p > 0.0:
                numbers, ctx.lowest, ctx.kept = draw_numbers(weights, dropout_p)
                dropped = mask_of(numbers, ctx.lowest, out=torch.empty_like(weights)).mul_(weights)
            outputs.append(scaled_product(1 / ctx.kept, dropped, v[:, :end]))
            saved += [weights if keeps_weights else None, numbers]
        ctx.save_for_backward(q, k, v, mask, *saved)
        y = concatenated(outputs)  # (B * K, T * G, D)
        return y.view(B, K, T, G * D).transpose(1, 2).reshape(B, T, H * D)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, *saved = ctx.saved_tensors
        B, (T, D) = len(grad), k.shape[1:]
        K, G = len(k) // B, q.shape[1] // T
        g = grad.view(B, T, K, G * D).transpose(1, 2).reshape(q.shape)
        scaling = 1 / math.sqrt(D) / ctx.kept
        d_queries = []
        # From the last queries, which see all keys, to the first.
        for i in reversed(range(len(saved) // 2)):
            weights, numbers = saved[2 * i : 2 * i + 2]
            end = min((i + 1) * QUERIES, T)
            rows = slice(i * QUERIES * G, end * G)
            if weights is None:
                weights = _weights(q, k, mask, i * QUERIES, end)
            d_weights = g[:, rows] @ v[:, :end].mT
            dropped = weights
            if numbers is not None:
                dropped = mask_of(numbers, ctx.lowest, out=torch.empty_like(weights))
                d_weights.mul_(dropped)
                dropped.mul_(weights)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dv_part = scaled_product(1 / ctx.kept, dropped.mT, g[:, rows])
            dk_part = scaled_product(scaling, d_scores.mT, q[:, rows])
            d_queries.append(scaled_product(scaling, d_scores, k[:, :end]))
            if end == T:
                dk, dv = dk_part, dv_part
            else:
                dk[:, :end] += dk_part
                dv[:, :end] += dv_part
        dq = concatenated(d_queries[::-1]).view(B, K, T, G, D).transpose(1, 2).flatten(2, 3)
        dk, dv = (t.view(B, K, T, D).transpose(1, 2) for t in (dk, dv))
        return dq, dk, dv, None, None, None


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, start: int, end: int) -> Tensor:
    """The weights with which the queries from `start` to `end` see the keys before `end`:
    (B * K, queries * G, keys), for q (B * K, T * G, D) and k (B * K, T, D)."""
    K, D = len(k), k.shape[2]
    G = q.shape[1] // k.shape[1]
    if mask is None:
        seen = torch.full((end - start, end), -math.inf, dtype=q.dtype, device=q.device)
        seen = seen.triu_(start + 1)[:, None].expand(-1, G, -1).flatten(0, 1)
    else:
        seen = mask[:, :, start:end, None, :end].expand(-1, K // len(mask), -1, G, -1)
        seen = seen.reshape(K, -1, end)
    queries = q[:, start * G : end * G]
    scores = torch.baddbmm(seen, queries, k[:, :end].mT, alpha=1 / math.sqrt(D))
    return F.softmax(scores, dim=-1)
