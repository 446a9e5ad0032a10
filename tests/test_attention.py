"""Attention: every form against float64, heads that share keys, dropout, the cache."""

import math

import pytest
import torch
from conftest import DEVICES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import language_model
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.language_model import (
    LanguageModel,
    mask_is_too_large,
    segments_lengths,
    segments_mask,
    segments_positions,
)
from models.llama import Llama
from ops import attention
from ops.attention import MASK_MAX_CONTEXT, KeyValueCache, causal_attention, plain_attention

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


SEGMENTS = torch.tensor([[1] * 5 + [2] + [3] * 194, [1] * 130 + [2] * 62 + [0] * 8])


@pytest.mark.parametrize("saves_memory", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
def test_segments_by_their_lengths_are_those_of_a_mask(device, dtype, saves_memory):
    """Values and gradients, of float64 with the mask."""
    inputs = make_inputs((2, 200, 4, 2, 8), dtype, device)
    assert segments_lengths(SEGMENTS) == [5, 1, 194, 130, 62, 8]
    mask, g = segments_mask(SEGMENTS, torch.float64), torch.randn(2, 200, 32, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in inputs]
    lengths = segments_lengths(SEGMENTS.to(device))
    y = causal_attention(*leaves, 0.0, True, lengths, saves_memory=saves_memory)
    found = [y, *torch.autograd.grad(y, leaves, g.to(y))]
    leaves = [t.double().requires_grad_() for t in inputs]
    y = exact_attention(*leaves, mask.to(device))
    exact = [y, *torch.autograd.grad(y, leaves, g.to(y))]
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        assert (a.double() - b).norm() <= TOLERANCES[dtype] * b.norm()


def test_segments_by_their_lengths_have_dropout():
    """Of uniform weights and ones as values, each output counts the keys that are left."""
    q, k, v = (torch.zeros(2, 200, 1, 4), torch.zeros(2, 200, 1, 4), torch.ones(2, 200, 1, 4))
    torch.manual_seed(0)
    y = causal_attention(q, k, v, 0.25, True, segments_lengths(SEGMENTS))[..., 0]
    left = y * 0.75 * (segments_positions(SEGMENTS) + 1)
    torch.testing.assert_close(left, left.round(), rtol=0, atol=1e-3)
    assert abs(y.mean().item() - 1) < 0.03 and (y != 1).float().mean() > 0.9


def packed_models(block_size: int) -> list[LanguageModel]:
    """One of each family, with and without dropout."""
    sizes = {"vocab_size": 300, "n_embd": 16, "block_size": block_size, "n_head": 2, "n_layer": 2}
    llama = {"n_kv_head": 1, "head_dim": 8, "n_inner": 24, "max_positions": block_size}
    torch.manual_seed(0)
    return [
        model
        for p in (0.0, 0.2)
        for model in (
            BigramLanguageModelLoRA(**sizes, device="cpu", dropout=p),
            Llama(**sizes, **llama, device="cpu", dropout=p),
        )
    ]


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        made = (t for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        self.numel = max([self.numel, *(t.untyped_storage().nbytes() // 4 for t in made)])
        return result


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_long_blocks_of_records_make_nothing_of_the_size_of_a_mask(grad_checkpoint):
    """Forward and backward, in both families, with dropout and without."""
    T = 1024
    segments = torch.repeat_interleave(torch.arange(16), 64)[None]
    idx = torch.randint(300, (1, T))
    for model in packed_models(T):
        model.grad_checkpoint = grad_checkpoint
        with Largest() as largest:
            model(idx, idx, segments)[1].backward()
        assert largest.numel < T * T / 2


@pytest.mark.parametrize("family", [0, 1])
def test_losses_of_records_are_the_same_with_and_without_a_mask(family, monkeypatch):
    """Within 1e-6 of the loss and 1e-5 of the gradients; small blocks have the mask."""
    T = MASK_MAX_CONTEXT + 20
    model = packed_models(T)[family]
    segments = torch.randint(2, (3, T)).cumsum(1)
    idx = torch.randint(300, (3, T))
    found = []
    for most in (T, MASK_MAX_CONTEXT):
        monkeypatch.setattr(language_model, "MASK_MAX_CONTEXT", most)
        assert mask_is_too_large(segments) == (most < T)
        loss = model(idx, idx, segments)[1]
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss, torch.cat([t.flatten() for t in gradients])))
    (loss, gradients), (expected, exact) = found
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradients - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("T", [96, MASK_MAX_CONTEXT + 20])
def test_a_process_may_have_no_block_of_a_batch(T):
    """With a mask and without, in both families and dtypes."""
    none = torch.zeros(0, T, dtype=torch.int64)
    for model in packed_models(T):
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad(), torch.autocast("cpu", dtype, dtype != torch.float32):
                assert model(none, none, none, reduction="none")[1].shape == (0, T)


def test_shapes_that_a_graph_fixes_keep_the_mask():
    """Blocks of records compile as one graph, whatever their segments."""
    torch._dynamo.reset()
    T = MASK_MAX_CONTEXT + 20
    idx, segments = torch.randint(300, (2, T)), torch.randint(2, (2, T)).cumsum(1)
    for model in packed_models(T)[:2]:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        loss, expected = (function(idx, idx, segments)[1] for function in (compiled, model))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


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
