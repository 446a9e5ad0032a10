"""Dropout that is cheap on a CPU, for the model and for the adapters alike."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element of `x` with probability `p` and scale the others by 1 / (1 - p).

    On a CPU the probability is rounded to a multiple of 1/65536 below 1; elsewhere this is
    `F.dropout`.
    """
    if not training or p == 0.0:
        return x
    return _Dropout.apply(x, p) if x.device.type == "cpu" else F.dropout(x, p)


def draw_mask(x: Tensor, p: float) -> Tensor:
    """A mask like `x`: 0 with probability `p`, otherwise 1 / (1 - p)."""
    if x.device.type != "cpu":
        return F.dropout(torch.ones_like(x), p)
    # 16 random bits an element, where torch's own function draws a number for each. They come
    # from torch's default generator, so seeds and resuming hold.
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(round(p * 65536), 65535)  # of 65536 values
    mask = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(bits, dropped - 32768, out=mask)  # 1.0 with probability 1 - dropped / 65536
    return mask.mul_(65536 / (65536 - dropped))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        mask = draw_mask(x, p)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad * mask, None
