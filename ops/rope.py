"""The rotation of queries and keys by their positions, in few passes over them."""

import torch
from torch import Tensor

from ops.products import differentiable_once


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of heads x (B, T, heads, D) by their angles, whose
    cosines and sines are (..., T, 1, D/2) (Su et al. 2021, arXiv 2104.09864).

    It is computed in the wider dtype of the arguments and rounded once, to that of x. On a CPU it
    has the bits of transformers' form; on a GPU it takes half the passes over x.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        return _Rotation.apply(x, cos, sin)
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x.dtype)


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
