"""Dropout that is cheap on a CPU, for models and adapters."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element of `x` with probability `p` and scale the others by 1 / (1 - p).

    On a CPU the probability is rounded to a multiple of 1/65536; elsewhere this is `F.dropout`.
    """
    if not training or p == 0.0:
        return x
    return _Dropout.apply(x, p) if draws_bits(x) else F.dropout(x, p)


def draws_bits(x: Tensor) -> bool:
    """Whether masks are made of random bits: on a CPU, but not under torch.compile.

    torch.compile draws within its own loops, and only for torch's own functions.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def draw_numbers(x: Tensor, p: float, bits: int = 16) -> tuple[Tensor, int, float]:
    """A dropout mask in its smallest form, which `mask_of` reads.

    Where `draws_bits`, the numbers have `bits` bits, 8 or 16. torch's own function would draw a
    float for each element. So `p` is rounded to a multiple of 2**-bits, above 0 and below 1. The
    numbers come from torch's default generator, so seeds and resuming hold.

    Returns random numbers of the shape of `x`, the lowest number that keeps its element, and the
    probability that an element is kept, 1 - p.
    """
    if not draws_bits(x):
        ones = torch.empty(x.shape, dtype=torch.uint8, device=x.device).bernoulli_(1.0 - p)
        return ones, 1, 1.0 - p
    draws = torch.empty(-(-x.numel() * bits // 64), dtype=torch.int64).random_(-(2**63), None)
    numbers = draws.view(torch.int8 if bits == 8 else torch.int16)[: x.numel()].view(x.shape)
    dropped = min(max(round(p * 2**bits), 1), 2**bits - 1)  # of the 2**bits values
    return numbers, dropped - 2 ** (bits - 1), 1.0 - dropped / 2**bits


def mask_of(numbers: Tensor, lowest: int, out: Tensor) -> Tensor:
    """Fill `out`, and return it, with 1 where a number keeps its element, and 0 elsewhere."""
    if numbers.dtype == torch.uint8:
        return out.copy_(numbers)
    return torch.ge(numbers, lowest, out=out)


class _Dropout(torch.autograd.Function):
    """x times a scaled mask of random bits, which is all that is kept for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        numbers, lowest, kept = draw_numbers(x, p)
        mask = mask_of(numbers, lowest, out=x.new_empty(x.shape)).mul_(1.0 / kept)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad * mask, None
