"""Attention: every form against float64, heads that share keys, dropout, the cache."""

import math

import pytest
import torch
from conftest import DEVICES

from ops import attention
from ops.attention import KeyValueCache, causal_attention, plain_attention

# B, T, H, K, D: as many heads of keys as of queries, fewer, one; one token, some blocks of queries.
SHAPES = [
    (2, 5, 3, 3, 4), (1, 64, 2, 2, 16), (2, 100, 1, 1, 8), (1, 300, 2, 2, 8),
    (2, 7, 4, 2, 8), (2, 130, 6, 2, 16), (1, 300, 4, 1, 8), (3, 1, 6, 3, 8), (2, 1, 2, 2, 4),
]  # fmt: skip

# Norm of the difference over the norm of what is exact, for the same rounded inputs.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1e-2}

FORMS = ["chosen", "plain", "fused", "fused, keys repeated"]


def make_inputs(shape, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    """Random q (B, T, H, D), k and v (B, T, K, D)."""
    B, T, H, K, D = shape
    torch.manual_seed(0)
    return [torch.randn(B, T, heads, D).to(device, dtype) for heads in (H, K, K)]


def mask_of_segments(B, T, dtype, device="cpu") -> torch.Tensor:
    """0 where a token sees another, in random segments of its row, else -inf: (B, 1, T, T)."""
    segments = torch.randint(2, (B, T)).cumsum(1)
    seen = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -math.inf).to(device)


def exact_attention(q, k, v, mask=None, kept=1.0):
    """dropout(softmax(q k^T / sqrt(D) + mask)) v by autograd: (B, T, H * D); `kept` (B, H, T, T)
    is what the dropout multiplies the weights by."""
    groups = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, 2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    T, D = q.shape[2:]
    if mask is None:
        mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    weights = (q @ k.mT / math.sqrt(D) + mask).softmax(-1)
    return (weights * kept @ v).transpose(1, 2).flatten(2)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """A function of q, k, v and mask that takes this form."""
    if request.param == "plain":
        return lambda q, k, v, mask=None: plain_attention(q, k, v, 0.0, mask)
    if request.param != "chosen":
        monkeypatch.setattr(attention, "PLAIN_ATTENTION_MAX_CONTEXT", 0)
    if request.param == "fused, keys repeated":
        monkeypatch.setattr(attention, "_fused_form_takes_groups", lambda q, mask: False)
    return lambda q, k, v, mask=None: causal_attention(q, k, v, 0.0, True, mask)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_form_agrees_with_float64(form, device, dtype, shape):
    """Values and gradients, with and without segments."""
    B, T, H, _, D = shape
    inputs = make_inputs(shape, dtype, device)
    g = torch.randn(B, T, H * D).to(device, dtype)
    for mask in (None, mask_of_segments(B, T, dtype, device)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = form(*leaves, mask)
        found = [y, *torch.autograd.grad(y, leaves, g)]
        leaves = [t.double().requires_grad_() for t in inputs]
        y = exact_attention(*leaves, None if mask is None else mask.double())
        exact = [y, *torch.autograd.grad(y, leaves, g.double())]
        for a, b, name in zip(found, exact, ("y", "dq", "dk", "dv"), strict=True):
            assert a.shape == b.shape and a.dtype == dtype, name
            # With one key its weight is 1, so that its score's gradient is 0 but for rounding.
            scale = max(b.norm(), g.double().norm() if T == 1 and name in ("dq", "dk") else 0.0)
            assert (a.double() - b).norm() <= TOLERANCES[dtype] * scale, name


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize(("H", "K"), [(6, 3), (6, 2), (4, 1), (3, 3)])
def test_a_group_of_successive_query_heads_reads_one_key_head(form, T, H, K):
    """With values that say which head they are of."""
    q, k, v = make_inputs((2, T, H, K, 8))
    v = torch.arange(K).float()[:, None].expand_as(v)
    heads = form(q, k, v).view(2, T, H, 8)
    expected = torch.tensor([i // (H // K) for i in range(H)]).float()[:, None].expand_as(heads)
    torch.testing.assert_close(heads, expected, rtol=1e-5, atol=0)


def test_heads_of_queries_are_a_multiple_of_those_of_keys():
    with pytest.raises(ValueError, match=r"4 heads of queries .* multiple of 3 heads of keys"):
        causal_attention(*make_inputs((1, 5, 4, 3, 8)), 0.0, True)


@pytest.mark.parametrize("T", [32, 150])
@pytest.mark.parametrize(("H", "K"), [(1, 1), (4, 2)])
def test_dropout_drops_whole_weights(T, H, K):
    """With one-hot values the output is the dropped weights themselves, and it and the gradients
    are those of these weights, with segments too."""
    q, k, v = make_inputs((2, T, H, K, T))
    ones_hot = torch.eye(T)[:, None].expand_as(v)
    torch.manual_seed(0)
    # Uniform attention: every weight of row i is 1 / (i + 1).
    kept = plain_attention(torch.zeros_like(q), k, ones_hot, 0.25).view(2, T, H, T).transpose(1, 2)
    kept = kept * torch.arange(1, T + 1)[:, None]  # (B, H, T, T)
    seen = torch.ones(T, T).tril() == 1
    assert set((kept * 0.75).round(decimals=4).unique().tolist()) == {0.0, 1.0}
    assert not kept[..., ~seen].any()
    deviation = math.sqrt(0.25 * 0.75 / (2 * H * seen.sum()))
    assert abs(kept[..., seen].mean().item() * 0.75 - 0.75) < 4 * deviation

    leaves = [t.requires_grad_() for t in (q, k, v)]
    for mask in (None, mask_of_segments(2, T, torch.float32)):
        torch.manual_seed(0)
        found = causal_attention(*leaves, 0.25, True, mask)
        expected = exact_attention(*leaves, mask, kept)
        g = torch.randn_like(found)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for a, b in zip(
            *(torch.autograd.grad(y, leaves, g) for y in (found, expected)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_of_one_token_has_dropout_too(dtype):
    """With one key its weight is 1: dropped, or scaled by 1 / (1 - p)."""
    torch.manual_seed(0)
    ones = [torch.ones(200, 1, heads, 4, dtype=dtype) for heads in (2, 1, 1)]
    y = causal_attention(*ones, 0.5, training=True)
    assert y.unique().tolist() == [0.0, 2.0]
    assert causal_attention(*ones, 0.5, training=False).unique().tolist() == [1.0]


@pytest.mark.parametrize("sizes", [[20], [5, 15], [1, 2, 7, 1, 9], [19, 1]])
@pytest.mark.parametrize(("H", "K"), [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_in_pieces_give_the_same_as_at_once(device, H, K, sizes):
    """Within 1e-5 of the largest output, with and without segments; the cache has K heads."""
    inputs = make_inputs((2, 20, H, K, 8), device=device)
    for mask in (None, mask_of_segments(2, 20, torch.float32, device)):
        whole = causal_attention(*inputs, 0.0, False, mask)
        cache, parts = KeyValueCache(32), []
        for size in sizes:
            start, end = cache.length, cache.length + size
            seen = None if mask is None else mask[:, :, start:end, :end]
            pieces = [t[:, start:end] for t in inputs]
            parts.append(causal_attention(*pieces, 0.0, False, seen, cache))
        assert cache.length == 20 and cache.keys.shape == (2, K, 32, 8)
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("K", [2, 1])
def test_compiled_attention_has_one_mask_forward_and_backward(K):
    """The output is linear in the values, for one mask: their gradients say what it was."""
    torch._dynamo.reset()
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    q, k, v = (t.requires_grad_() for t in make_inputs((3, 70, 2, K, 8)))
    y, gradient = compiled(q, k, v, 0.3, True), torch.randn(3, 70, 16)
    y.backward(gradient)
    torch.testing.assert_close((v.grad * v).sum(), (y * gradient).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [1, 70])
def test_attention_without_dropout_compiles_as_one_graph(T):
    torch._dynamo.reset()
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    inputs = make_inputs((3, T, 4, 2, 8))
    torch.testing.assert_close(compiled(*inputs, 0.0, True), exact_attention(*inputs))
