"""The loss of a language model whose head is frozen, without keeping its logits."""

import torch
from torch import Tensor

from ops.products import base_slices, differentiable_once

# Logits that exist at one time: 128 MiB of them in float32.
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


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, targets: Tensor) -> Tensor:
        counted = (targets >= 0)[:, None].to(x.dtype if x.itemsize >= 4 else torch.float32)
        scale = counted / counted.sum()  # of each token in the mean, (tokens, 1)
        targets = targets.clamp(min=0)[:, None]
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        loss = 0.0
        size = max(1, LOGITS // len(W))
        for start in range(0, len(x), size):
            part = slice(start, min(start + size, len(x)))
            logits = x.new_empty(part.stop - start, len(W))
            for outputs, weight in base_slices([W], x.dtype):
                torch.mm(x[part], weight.t(), out=logits[:, outputs])
            wide = logits.to(scale.dtype)
            del logits
            wide.sub_(wide.amax(-1, keepdim=True))
            found = wide.gather(-1, targets[part])
            total = wide.exp_().sum(-1, keepdim=True)
            loss = loss + ((total.log() - found) * scale[part]).sum()
            if dx is None:
                continue
            # The gradient of the logits: (softmax - one-hot) scale.
            wide.mul_(scale[part] / total).scatter_add_(-1, targets[part], -scale[part])
            wide = wide.to(x.dtype)
            for i, (outputs, weight) in enumerate(base_slices([W], x.dtype)):
                dx[part].addmm_(wide[:, outputs], weight, beta=0 if i == 0 else 1)
        ctx.save_for_backward(dx)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (dx,) = ctx.saved_tensors
        return dx * grad.to(dx.dtype), None, None
