"""Norms that keep less for backward than autograd's own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.products import differentiable_once

# Whether torch has one kernel for the norm on CUDA, which keeps no more than the function below.
CUDA_HAS_RMS_NORM = torch.__version__ >= (2, 9)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension C of x (..., C), for a weight
    (C,) (Zhang and Sennrich 2019, arXiv 1910.07467).

    Of x in a lower precision it is computed in float32 and rounded before the weight. Autograd
    would keep three tensors of the size of x; here x is kept, and a number for each row.
    """
    if CUDA_HAS_RMS_NORM and x.is_cuda and x.itemsize >= 4:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        wide, scale = _scaled(x, eps)
        return weight * (wide * scale).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


def _scaled(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x in float32 or above, and 1 / sqrt(mean(x^2) + eps) of each row, (..., 1)."""
    wide = x.float() if x.itemsize < 4 else x
    return wide, torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide, scale = _scaled(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x * scale  # (..., C)
        d_weight = dx = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            d_normal = grad * weight
            along = (d_normal * normal).mean(-1, keepdim=True)
            dx = (d_normal - normal.mul_(along)).mul_(scale).to(x.dtype)
        return dx, d_weight, None
