"""The rotation of queries and keys by their positions, in few passes over them."""

import torch
from torch import Tensor

from ops.products import differentiable_once


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of heads x (B, T, heads, D) by their angles, whose
    cosines and sines are (..., T, 1, D/2) (Su et al. 2021, arXiv 2104.09864).

    It is computed in the wider dtype of the arguments and rounded once, to that of x. Autograd
    would take twice the passes over x, and more backward.
    """
    if torch.compiler.is_compiling() or x.device.type == "mps":  # where the other was never tried
        one, two = x.chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x.dtype)
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = x.new_empty(x.shape)
    (one, two), (first, second) = (t.chunk(2, -1) for t in (x, turned))
    torch.addcmul(one * cos, two, sin, value=-1, out=first)
    torch.addcmul(two * cos, one, sin, out=second)
    return turned
