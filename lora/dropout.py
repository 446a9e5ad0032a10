"""Dropout that is cheap on a CPU, for the model and for the adapters alike."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element of `x` with probability `p` and scale the others by 1 / (1 - p).

    On a CPU the probability is rounded to a multiple of 1/65536; elsewhere this is `F.dropout`.
    """
    if not training or p == 0.0:
        return x
    return _Dropout.apply(x, p) if x.device.type == "cpu" else F.dropout(x, p)


def draw_mask(x: Tensor, p: float, bits: int = 16) -> tuple[Tensor, float]:
    """A mask like `x` of 0 with probability `p` and else 1, and the probability of a 1.

    On a CPU it takes `bits` random bits an element, 8 or 16, where torch's own function draws a
    number for each, so that `p` is rounded to a multiple of 2**-bits, above 0 and below 1. They
    come from torch's default generator, so seeds and resuming hold.
    """
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.device.type != "cpu":
        return mask.bernoulli_(1.0 - p), 1.0 - p
    per_number = 64 // bits
    numbers = torch.empty(-(-x.numel() // per_number), dtype=torch.int64).random_(-(2**63), None)
    values = numbers.view(torch.int8 if bits == 8 else torch.int16)[: x.numel()].view(x.shape)
    dropped = min(max(round(p * 2**bits), 1), 2**bits - 1)  # of the 2**bits values
    torch.ge(values, dropped - 2 ** (bits - 1), out=mask)
    return mask, 1.0 - dropped / 2**bits


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        mask, kept = draw_mask(x, p)
        mask.mul_(1.0 / kept)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad * mask, None
