"""The loss of a language model whose head is frozen, without keeping its logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.products import base_slices, differentiable_once

# Logits that exist at one time: 128 MiB of them in float32. Of a head that is cast to it each slice
# casts the head twice.
LOGITS = 2**25


def linear_cross_entropy(x: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of the logits x W^T, over the targets that are not negative.

    The gradient of x is made in forward, in place of the logits of some tokens at a time, and is
    all that is kept (Wijmans et al. 2024, "Cut Your Losses", arXiv 2411.09009, have the idea).

    Args:
        x: (tokens, C), in the dtype of the product.
        W: the frozen weight of the head, (vocab_size, C), in that dtype or a lower precision.
        targets: (tokens,) int64; nan is the mean over none.

    Returns () float32, or float64 for such x.
    """
    return _LinearCrossEntropy.apply(x, W, targets)


@torch.no_grad()
def linear_losses(x: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each row's logits x W^T, 0 where its target is negative: (tokens,).

    The arguments are those of `linear_cross_entropy`.
    """
    losses = []
    for part in _slices(len(x), len(W)):
        logits = _wide_logits(x[part], W)
        known = targets[part].where(targets[part] >= 0, -100)
        losses.append(F.cross_entropy(logits, known, reduction="none"))
    return torch.cat(losses)


def _slices(tokens: int, vocabulary: int) -> list[slice]:
    """The tokens whose logits exist at one time."""
    size = max(1, LOGITS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _wide_logits(x: Tensor, W: Tensor) -> Tensor:
    """x W^T, (tokens, vocab_size), in float32 or above."""
    logits = x.new_empty(len(x), len(W))
    for outputs, weight in base_slices([W], x.dtype):
        torch.mm(x, weight.t(), out=logits[:, outputs])
    return logits.float() if logits.itemsize < 4 else logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, targets: Tensor) -> Tensor:
        counted = (targets >= 0)[:, None]  # (tokens, 1)
        # Of each token in the mean, (tokens, 1).
        scale = counted.to(torch.promote_types(x.dtype, torch.float32)) / counted.sum()
        # A token's share of a mean may be too small for float16, but not times GradScaler's factor.
        # That is in `grad`, so there the mean is taken in backward.
        count = counted.sum() if x.dtype == torch.float16 else None
        share = scale if count is None else counted.to(scale.dtype)
        targets = targets.clamp(min=0)[:, None]
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        loss = 0.0
        for part in _slices(len(x), len(W)):
            wide = _wide_logits(x[part], W)
            wide.sub_(wide.amax(-1, keepdim=True))
            found = wide.gather(-1, targets[part])
            total = wide.exp_().sum(-1, keepdim=True)
            loss = loss + ((total.log() - found) * scale[part]).sum()
            if dx is None:
                continue
            # The gradient of the logits: (softmax - one-hot) share.
            wide.mul_(share[part] / total).scatter_add_(-1, targets[part], -share[part])
            wide = wide.to(x.dtype)
            for i, (outputs, weight) in enumerate(base_slices([W], x.dtype)):
                dx[part].addmm_(wide[:, outputs], weight, beta=0 if i == 0 else 1)
        ctx.save_for_backward(dx, count)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        dx, count = ctx.saved_tensors
        if count is not None:
            return (dx.float() * (grad / count)).to(dx.dtype), None, None
        return dx * grad.to(dx.dtype), None, None
