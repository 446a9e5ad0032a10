"""Head and cross-entropy together, in chunks of tokens, so that logits are never whole.

A vocabulary of published models makes the logits of a batch larger than all else in a step, and
autograd keeps several tensors of their size. Here the gradients are made in forward, in place of
the logits of a chunk (Wijmans et al. 2024, "Cut Your Losses", arXiv 2411.09009, have the idea):

    logits = x W^T + s (x A^T) B^T        g = softmax(logits) - one-hot(targets)
    dx = g W + s (g B) A        dW = g^T x        dA = s (g B)^T x        dB = s g^T (x A^T)

x is (tokens, C), W (vocab_size, C), A (rank, C) and B (vocab_size, rank). Tokens whose target is
negative do not count, and are left out before the head.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ops.products import (
    CAST,
    differentiable_once,
    float32_product,
    product_dtype,
    scaled_product,
    sums_to_float32,
)
from ops.shapes import may_depend_on_values

# Logits that exist at one time: 160 MiB in float32, of which a GPU has a second copy. Each chunk
# reads the whole weight, so that with fewer a vocabulary of 151,936 takes longer than the plain
# form (`python benchmarks/head.py`).
LOGITS = 40 * 2**20

# The logits of which a CPU computes the loss at a time, in float32: the next operation finds them
# in the cache.
IN_CACHE = 2**20

# Up to this vocabulary the plain form, logits and then their loss, is as fast or faster. `python
# benchmarks/cpu_operations.py --sections loss` compares values of both constants.
PLAIN_VOCABULARY = 4096

# The numbers of a weight that a GPU casts at a time; a CPU casts CAST of them.
GPU_CAST = 2**24


def fusing_pays(vocab_size: int) -> bool:
    """Whether the functions below are faster than logits and then their loss."""
    return vocab_size > PLAIN_VOCABULARY


def linear_cross_entropy(
    x: Tensor,
    targets: Tensor,
    W: Tensor,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """The mean cross-entropy of the logits x W^T + scaling (x A^T) B^T, over the targets that are
    not negative.

    The gradients of all tensors that need one are kept for backward, and nothing else. Backward
    scales them in place, and can run once.

    Args:
        x: (tokens, C); products are in autocast's dtype, where that is on.
        targets: (tokens,) int64; nan is the mean over none.
        W: the weight of the head, (vocab_size, C).
        A, B: an adapter of the head, (rank, C) and (vocab_size, rank), or None.
        scaling: the adapter's.

    Returns () float32, or float64 for such x.
    """
    if not torch.is_grad_enabled():
        losses = linear_losses(x, targets, W, A, B, scaling)
        return losses.sum() / (targets >= 0).sum()
    return _LinearCrossEntropy.apply(x, targets, W, A, B, scaling)


@torch.no_grad()
def linear_losses(
    x: Tensor,
    targets: Tensor,
    W: Tensor,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """The cross-entropy of each row's logits, 0 where its target is negative: (tokens,).

    The arguments and the dtype are those of `linear_cross_entropy`.
    """
    rows, counted = _counted(targets), targets[:, None] >= 0
    x, known = _taken(x, rows), _taken(targets, rows).clamp(min=0)[:, None]
    found = [losses for *_, losses in _chunks(x, known, False, W, A, B, scaling)]
    losses = torch.cat(found) if found else x.new_zeros(0, 1)
    if rows is not None:
        losses = losses.new_zeros(counted.shape).index_copy_(0, rows, losses)
    return (losses * counted).squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        targets: Tensor,
        W: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        scaling: float,
    ) -> Tensor:
        rows, n = _counted(targets), (targets >= 0).sum()
        ctx.shape, ctx.dtypes = x.shape, [None if t is None else t.dtype for t in (x, W, A, B)]
        x, targets = _taken(x, rows), _taken(targets, rows)[:, None]
        wide = torch.promote_types(x.dtype, torch.float32)
        # Tokens that do not count are still there where shapes are fixed. Then the matrices beside
        # the logits' gradients have zeros for them, (tokens, 1), which are smaller than the logits.
        counts = None if may_depend_on_values(targets) else (targets >= 0).to(wide)
        needed = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
        dx, dW, dA, dB = (
            torch.zeros(t.shape, dtype=wide, device=x.device) if needs else None
            for t, needs in zip((x, W, A, None if B is None else B.t()), needed, strict=True)
        )  # dB lies as (rank, vocab_size), the order in which its product is faster
        dtype = product_dtype(x)
        loss = torch.zeros((), dtype=wide, device=x.device)
        known = targets.clamp(min=0)
        for part, g, losses in _chunks(x, known, any(needed), W, A, B, scaling):
            loss += losses.sum() if counts is None else (losses * counts[part]).sum()
            if not any(needed):
                continue
            inputs = x[part].to(dtype)
            if counts is not None and (dW is not None or A is not None):
                inputs = inputs * counts[part].to(dtype)
            for outputs, weight in _slices(W, dtype):
                if dx is not None:
                    _add_product(dx[part], g[:, outputs], weight)
                if dW is not None:
                    _add_product(dW[outputs], g[:, outputs].t(), inputs)
            if A is not None:
                down, up = A.to(dtype), B.to(dtype)
                gB = scaled_product(scaling, up.t(), g.t())  # (rank, tokens)
                if dx is not None:
                    _add_product(dx[part], gB.t(), down)
                if dA is not None:
                    _add_product(dA, gB, inputs)
                if dB is not None:
                    _add_product(dB, scaled_product(scaling, down, inputs.t()), g)
        if counts is not None and dx is not None:
            dx *= counts
        ctx.save_for_backward(rows, n, dx, dW, dA, dB)
        return loss / n

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, n, dx, dW, dA, dB = ctx.saved_tensors
        for gradient in (dx, dW, dA, dB):
            if gradient is not None:
                gradient.mul_(grad / n)
        if dx is not None and rows is not None:
            dx = dx.new_zeros(ctx.shape).index_copy_(0, rows, dx)
        gradients = (dx, dW, dA, None if dB is None else dB.t())
        dx, dW, dA, dB = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return dx, None, dW, dA, dB, None


def _counted(targets: Tensor) -> Tensor | None:
    """Which targets are not negative: (n_counted,) int64; None for all.

    Where shapes are fixed all tokens are taken, and those that do not count are multiplied by 0.
    """
    if not may_depend_on_values(targets):
        return None
    rows = (targets >= 0).nonzero().squeeze(1)
    return None if len(rows) == len(targets) else rows


def _taken(t: Tensor, rows: Tensor | None) -> Tensor:
    return t if rows is None else t[rows]


def _chunks(
    x: Tensor,
    targets: Tensor,
    gradients: bool,
    W: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some tokens at a time: which, the gradient of the sum of their losses to their logits,
    (tokens, vocab_size), and the losses, (tokens, 1), in float32 or above.

    All gradients lie in the same memory, that of the logits. Without `gradients` it holds something
    else. `targets` are (tokens, 1) and not negative.
    """
    tokens, vocabulary, dtype = len(x), len(W), product_dtype(x)
    most = max(1, LOGITS // vocabulary)
    size = -(-tokens // max(1, -(-tokens // most)))  # chunks of about equal sizes, of at most that
    logits = x.new_empty(size, vocabulary, dtype=dtype)
    together = max(1, IN_CACHE // vocabulary) if x.device.type == "cpu" else size
    down, up = (None, None) if A is None else (A.to(dtype), B.to(dtype))
    for start in range(0, tokens, max(1, size)):
        part = slice(start, min(start + size, tokens))
        inputs = x[part].to(dtype)
        found = logits[: len(inputs)]
        for outputs, weight in _slices(W, dtype):
            torch.mm(inputs, weight.t(), out=found[:, outputs])
        if down is not None:
            found.addmm_(scaled_product(scaling, inputs, down.t()), up.t())
        losses = []
        for i in range(0, len(found), together):
            rows = slice(start + i, min(start + i + together, part.stop))
            losses.append(_cross_entropy(found[i : i + together], targets[rows], gradients))
        yield part, found, torch.cat(losses)


def _cross_entropy(logits: Tensor, targets: Tensor, gradients: bool) -> Tensor:
    """The losses of the logits (tokens, vocab_size), each (tokens, 1); with `gradients` those to
    the logits, softmax(logits) - one-hot(targets), take the place of these."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.is_cuda:  # which reads the logits fewer times, and takes the exponentials twice
        wide = torch.log_softmax(logits, -1, dtype=dtype)
        of_target = wide.gather(-1, targets)
        if gradients:
            torch.exp(wide, out=logits)
            logits.scatter_(-1, targets, of_target.expm1().to(logits.dtype))
        return -of_target
    wide = logits.to(dtype)
    wide.sub_(wide.amax(-1, keepdim=True))
    of_target = wide.gather(-1, targets)
    total = wide.exp_().sum(-1, keepdim=True)
    if gradients:
        wide.mul_(1 / total).scatter_add_(-1, targets, -torch.ones_like(total))
        logits.copy_(wide)
    return total.log() - of_target


def _slices(W: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in `dtype` in slices of outputs: which, and their rows; in one where it has that
    dtype. A cast copy of all would be as large as the logits of many tokens."""
    if W.dtype == dtype or W.device.type not in ("cpu", "cuda"):
        yield slice(None), W.to(dtype)
        return
    start = 0
    for rows in W.split(max(1, (GPU_CAST if W.is_cuda else CAST) // W.shape[1])):
        yield slice(start, start + len(rows)), rows.to(dtype)
        start += len(rows)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where a sum of a wider dtype than the factors' rounds no more than these."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and sums_to_float32(a):
        total.add_(float32_product(a, b))
    else:
        total.add_(torch.mm(a, b))
