"""LoRALinear: a frozen linear and its low-rank adapter, in the fewest and cheapest products.

The layer computes y = x W^T + b + s (x A^T) B^T with s = alpha / rank (Hu et al. 2021, "LoRA",
arXiv 2106.09685). Left to autograd that is slower than training W itself, for every adapter adds
small products and keeps intermediate results. Here it takes one of two forms:

    merged      y = x M^T + b  and  dx = g M      with M = W + s B A made for each step
    two paths   y = x W^T + b + s (x A^T) B^T     where making M costs more than it saves:
                dx = g W + s (g B) A              few tokens, or dropout between x and A

    both        dB = s g^T (x A^T)  and  dA = s (g B)^T x

Only x is kept for backward, with dropout its mask, and M or W where it was cast for the step.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora.dropout import draw_mask, dropout

# Below this many multiply-adds a product costs little more than its launch. Then the fewest
# operations win, and those are autograd's own on M = W + s B A, through the gradient of M.
SMALL = 2**26

# On a CPU a product over many tokens is faster as a batch of products over this many, summed.
TOKEN_CHUNK = 512


class LoRALinear(nn.Module):
    """A linear layer with frozen `weight` and `bias` and trainable `lora_A` and `lora_B`.

    The state dict is that of `linear`, whose parameters are adopted and not copied, plus
    `lora_A` (rank, in_features) and `lora_B` (out_features, rank). A is Kaiming-uniform and B is
    zero, so that the layer equals `linear` before the first step, to the bit.

    Args:
        linear: the layer to adapt.
        rank: columns of B and rows of A, at least 1.
        alpha: the adapter is scaled by alpha / rank.
        dropout: probability of dropping an element of the adapter's input while training.

    Raises ValueError for a rank below 1 or a dropout outside [0, 1).
    """

    def __init__(
        self, linear: nn.Linear, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank} is not at least 1")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} is not in [0, 1)")
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias if linear.bias is None else linear.bias.requires_grad_(False)
        # Float32 whatever the base's dtype: small updates would be lost in bfloat16.
        options = {"device": linear.weight.device, "dtype": torch.float32}
        if linear.weight.dtype == torch.float64:
            options["dtype"] = torch.float64
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **options))
        self.reset_parameters()
        self.train(linear.training)

    def reset_parameters(self) -> None:
        """Start the adapter afresh: B A = 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return _adapted(x, [self])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}, alpha={self.alpha}, "
            f"dropout={self.dropout}"
        )


def grouped_linear(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """`[layer(x) for layer in layers]`, as one product where the layers are alike.

    Alike are plain linears with biases, and LoRALinears of one rank, scaling and dropout. The
    latter share the dropout's mask too, since they share its input. Forward hooks of layers that
    are alike do not run.
    """
    first = layers[0]
    if all(type(layer) is nn.Linear and layer.bias is not None for layer in layers):
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        return F.linear(x, weight, bias).split([layer.weight.shape[0] for layer in layers], -1)
    if all(
        type(layer) is LoRALinear
        and (layer.rank, layer.alpha, layer.dropout) == (first.rank, first.alpha, first.dropout)
        and (layer.bias is None) == (first.bias is None)
        for layer in layers
    ):
        return _adapted(x, layers).split([layer.out_features for layer in layers], -1)
    return [layer(x) for layer in layers]


def _adapted(x: Tensor, layers: Sequence[LoRALinear]) -> Tensor:
    """The outputs, side by side, of LoRALinears that share x, rank, scaling and dropout."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    first = layers[0]
    tokens = x.numel() // max(1, first.in_features)
    p = first.dropout if first.training else 0.0
    W = [layer.weight for layer in layers]
    b = [layer.bias for layer in layers if layer.bias is not None]
    A = [layer.lora_A for layer in layers]
    B = [layer.lora_B for layer in layers]
    base_trains = any(t.requires_grad for t in W + b)
    bias = _stack(b).to(x.dtype) if b else None
    if p == 0.0 and all(merging_pays(tokens, layer) for layer in layers):
        if base_trains or all(tokens * weight.numel() <= SMALL for weight in W):
            return _merged_by_autograd(x, first.scaling, bias, W, A, B)
        return _Merged.apply(x, first.scaling, bias, *W, *A, *B)
    if base_trains:
        return _two_paths_by_autograd(x, first.scaling, bias, p, W, A, B)
    mask = draw_mask(x, p) if p > 0.0 else None
    return _TwoPaths.apply(x, first.scaling, bias, mask, *W, *A, *B)


def merging_pays(tokens: int, layer: LoRALinear) -> bool:
    """Whether a pass over W costs less than two passes over activations of `tokens` rows.

    M = W + s B A is made by going over in * out numbers, forward and backward. Two paths go over
    tokens * out numbers forward and tokens * in backward.

    A base in a lower precision than its adapter is never merged: the sum would be rounded to
    steps larger than the adapter's.
    """
    n_in, n_out = layer.in_features, layer.out_features
    return layer.weight.dtype == layer.lora_A.dtype and tokens * (n_in + n_out) > 2 * n_in * n_out


Tensors = Sequence[Tensor]  # one of each layer: W (out, in), A (rank, in) or B (out, rank)


def _merged_by_autograd(
    x: Tensor, s: float, bias: Tensor | None, W: Tensors, A: Tensors, B: Tensors
) -> Tensor:
    """The merged form in autograd's own operations, which serves a trainable W as well."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    # Not a `with torch.autocast(...)`: where this form is used, that would cost as much as it.
    torch.set_autocast_enabled(device, False)
    try:
        M = [torch.addmm(*wba, alpha=s) for wba in zip(W, B, A, strict=True)]
        return F.linear(x, _stack(M).to(x.dtype), bias)
    finally:
        torch.set_autocast_enabled(device, autocast)


def _two_paths_by_autograd(
    x: Tensor, s: float, bias: Tensor | None, p: float, W: Tensors, A: Tensors, B: Tensors
) -> Tensor:
    """The two-path form for a base that was made trainable, whose gradient is needed after all."""
    h = F.linear(dropout(x, p, training=True), _stack(A).to(x.dtype)).split(A[0].shape[0], -1)
    y = [F.linear(hi, up.to(x.dtype)) for hi, up in zip(h, B, strict=True)]
    return F.linear(x, _stack(W).to(x.dtype), bias) + s * torch.cat(y, -1)


class _Merged(torch.autograd.Function):
    """n LoRA linears on one input, outputs side by side; `parameters` are n W, n A and n B."""

    @staticmethod
    def forward(ctx, x: Tensor, scaling: float, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        W, A, B = _in_three(parameters)
        M = _merge(W, A, B, scaling, x.dtype)
        ctx.scaling = scaling
        # A merged weight is kept only where it was cast; else it is made again, as memory is dear.
        ctx.save_for_backward(x, M if x.dtype != W[0].dtype else None, *parameters)
        return F.linear(x, M, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, M, *parameters = ctx.saved_tensors
        W, A, B = _in_three(parameters)
        g = _rows(grad)
        dx = None
        if ctx.needs_input_grad[0]:
            if M is None:
                M = _merge(W, A, B, ctx.scaling, x.dtype)
            dx = (g @ M).view(x.shape)
            del M
        gB = _through_B(g, B, ctx.scaling)
        dA, dB = _adapter_gradients(_rows(x), g, A, B, ctx.scaling, gB)
        return dx, None, None, *(None for _ in W), *dA, *dB


class _TwoPaths(torch.autograd.Function):
    """The same with base and adapter apart; `mask`, if any, is dropout on the adapters' input."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        scaling: float,
        bias: Tensor | None,
        mask: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        W, A, B = _in_three(parameters)
        cast = _stack(W).to(x.dtype)
        y = F.linear(x, cast, bias)
        h = F.linear(x if mask is None else x * mask, _stack(A).to(x.dtype))
        columns = zip(_split(_rows(y), B), _rows(h).split(A[0].shape[0], 1), B, strict=True)
        for yi, hi, up in columns:
            yi.addmm_(hi, up.t().to(x.dtype), alpha=scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(x, mask, cast if x.dtype != W[0].dtype else None, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, cast, *parameters = ctx.saved_tensors
        W, A, B = _in_three(parameters)
        g = _rows(grad)
        gB = _through_B(g, B, ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ (_stack(W) if cast is None else cast)
            down = _stack(A).to(x.dtype)
            if mask is None:
                dx.addmm_(gB, down)
            else:
                dx.addcmul_(gB @ down, _rows(mask))
            dx = dx.view(x.shape)
        rows = _rows(x if mask is None else x * mask)
        dA, dB = _adapter_gradients(rows, g, A, B, ctx.scaling, gB)
        return dx, None, None, None, *(None for _ in W), *dA, *dB


def _merge(W: Tensors, A: Tensors, B: Tensors, s: float, dtype: torch.dtype) -> Tensor:
    """W + s B A of all layers, stacked; added up in W's dtype and rounded once, to `dtype`.

    `out=` keeps autocast from adding up in its own dtype, which would swallow small updates.
    """
    M = W[0].new_empty(sum(w.shape[0] for w in W), W[0].shape[1])
    for out, w, down, up in zip(_split(M, W, 0), W, A, B, strict=True):
        torch.addmm(w, up, down, alpha=s, out=out)
    return M.to(dtype)


def _through_B(g: Tensor, B: Tensors, s: float) -> Tensor:
    """s g B of all layers side by side: (T, n * rank)."""
    products = [gi @ (up * s).to(g.dtype) for gi, up in zip(_split(g, B), B, strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def _adapter_gradients(
    x: Tensor, g: Tensor, A: Tensors, B: Tensors, s: float, gB: Tensor
) -> tuple[Tensors, Tensors]:
    """dA and dB of each layer from x (T, in), g (T, sum of out) and s g B (T, n * rank)."""
    rank = A[0].shape[0]
    h = F.linear(x, (_stack(A) * s).to(x.dtype))  # (T, n * rank)
    dA = _over_tokens(gB, x).split(rank)
    columns = zip(h.split(rank, 1), _split(g, B), strict=True)
    return dA, [_over_tokens(hi, gi).t() for hi, gi in columns]


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for a (T, m) and b (T, n), where m is small."""
    T = a.shape[0]
    if a.device.type != "cpu" or T < 2 * TOKEN_CHUNK or T % TOKEN_CHUNK:
        return a.t() @ b
    a, b = (t.unflatten(0, (T // TOKEN_CHUNK, TOKEN_CHUNK)) for t in (a, b))
    return torch.bmm(a.transpose(1, 2), b).sum(0)


def _rows(t: Tensor) -> Tensor:
    """(..., features) -> (T, features)."""
    return t.reshape(-1, t.shape[-1])


def _stack(tensors: Tensors) -> Tensor:
    """One below the other; a single one as it is, for it needs no copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _split(t: Tensor, like: Tensors, dim: int = 1) -> Tensors:
    """The part of each layer, whose out_features are the first sizes of `like`."""
    return [t] if len(like) == 1 else t.split([part.shape[0] for part in like], dim)


def _in_three(parameters: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    n = len(parameters) // 3
    return parameters[:n], parameters[n : 2 * n], parameters[2 * n :]
