"""LoRALinear: a frozen linear and its low-rank adapter, in the fewest and cheapest products.

The layer computes y = x W^T + b + s (x A^T) B^T with s = alpha / rank (Hu et al. 2021, "LoRA",
arXiv 2106.09685). Left to autograd that is slower than training W itself, for every adapter adds
small products and keeps intermediate results. Here two autograd functions share the work:

    merged      y = x M^T + b  and  dx = g M      with M = W + s B A made for each step
    two paths   y = x W^T + b + s (x A^T) B^T     where making M costs more than it saves:
                dx = g W + s (g B) A              few tokens, or dropout between x and A

    both        dB = s g^T (x A^T)  and  dA = s (g B)^T x

Only x is kept for backward, and M or W where it was cast for the step.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora.dropout import draw_mask

# In bfloat16 a product of fewer multiply-adds than this costs little more than its launch: then
# dW = g^T x and two tiny products are cheaper than four skinny ones.
DENSE_GRADIENT_LIMIT = 2**26

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

    def reset_parameters(self) -> None:
        """Start the adapter afresh: B A = 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return _adapted(x, [self])[0]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}, alpha={self.alpha}, "
            f"dropout={self.dropout}"
        )


def grouped_linear(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """`[layer(x) for layer in layers]`, with the products that read x shared by all the layers
    where they are LoRALinears of one rank, scaling and dropout."""
    first = layers[0]
    alike = all(
        type(layer) is LoRALinear
        and (layer.rank, layer.alpha, layer.dropout) == (first.rank, first.alpha, first.dropout)
        for layer in layers
    )
    return _adapted(x, layers) if alike else [layer(x) for layer in layers]


def _adapted(x: Tensor, layers: Sequence[LoRALinear]) -> Sequence[Tensor]:
    """The outputs of LoRALinears that share x, rank, scaling and dropout."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    first = layers[0]
    p = first.dropout if first.training else 0.0
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers]
    down = [layer.lora_A for layer in layers]
    up = [layer.lora_B for layer in layers]
    if any(t is not None and t.requires_grad for t in weights + biases):
        return [_by_autograd(x, layer, p) for layer in layers]
    if p == 0.0 and all(merging_pays(x.numel() // max(1, x.shape[-1]), la) for la in layers):
        return _Merged.apply(x, first.scaling, *weights, *biases, *down, *up)
    mask = draw_mask(x, p) if p > 0.0 else None
    return _TwoPaths.apply(x, first.scaling, mask, *weights, *biases, *down, *up)


def merging_pays(tokens: int, layer: LoRALinear) -> bool:
    """Whether a pass over W costs less than two passes over activations of `tokens` rows.

    M = W + s B A is made by going over in * out numbers, forward and backward. Two paths go over
    tokens * out numbers forward and tokens * in backward.

    A base in a lower precision than its adapter is never merged: the sum would be rounded to
    steps larger than the adapter's.
    """
    n_in, n_out = layer.in_features, layer.out_features
    return layer.weight.dtype == layer.lora_A.dtype and tokens * (n_in + n_out) > 2 * n_in * n_out


def _by_autograd(x: Tensor, layer: LoRALinear, p: float) -> Tensor:
    """One layer whose base was made trainable, so that W needs its gradient after all."""
    adapter = F.linear(F.linear(F.dropout(x, p), layer.lora_A), layer.lora_B)
    return F.linear(x, layer.weight, layer.bias) + layer.scaling * adapter


class _Merged(torch.autograd.Function):
    """n LoRA linears on one input; the arguments after `scaling` are n W, n b, n A and n B."""

    @staticmethod
    def forward(ctx, x: Tensor, scaling: float, *parameters: Tensor) -> tuple[Tensor, ...]:
        W, b, A, B = _in_four(parameters)
        M = _merge(W, A, B, scaling, x.dtype)
        # A merged weight is kept only where it was cast; else it is made again, as memory is dear.
        ctx.keeps_M = x.dtype != W[0].dtype
        ctx.scaling = scaling
        ctx.save_for_backward(x, *(M if ctx.keeps_M else W), *A, *B)
        return _linear(x, M, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        M, A, B = _in_three(parameters)
        rows, grads = _rows(x), [_rows(g) for g in grads]
        dx = None
        if ctx.needs_input_grad[0]:
            if not ctx.keeps_M:
                M = _merge(M, A, B, ctx.scaling, x.dtype)
            dx = _input_gradient(grads, M).view(x.shape)
        dA, dB = _adapter_gradients(rows, grads, A, B, ctx.scaling)
        return dx, None, *(None for _ in 2 * A), *dA, *dB


class _TwoPaths(torch.autograd.Function):
    """The same with base and adapter apart; `mask`, if any, is dropout on the adapters' input."""

    @staticmethod
    def forward(
        ctx, x: Tensor, scaling: float, mask: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        W, b, A, B = _in_four(parameters)
        W = [w.to(x.dtype) for w in W]
        ys = _linear(x, W, b)
        h = F.linear(x if mask is None else x * mask, torch.cat(A).to(x.dtype))
        for y, hi, up in zip(ys, _rows(h).split(A[0].shape[0], 1), B, strict=True):
            _rows(y).addmm_(hi, up.t().to(x.dtype), alpha=scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(x, mask, *W, *A, *B)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, *parameters = ctx.saved_tensors
        W, A, B = _in_three(parameters)
        grads = [_rows(g) for g in grads]
        gB = _through_B(grads, B, ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(grads, W)
            down = torch.cat(A).to(x.dtype)
            if mask is None:
                dx.addmm_(gB, down)
            else:
                dx.addcmul_(gB @ down, _rows(mask))
            dx = dx.view(x.shape)
        rows = _rows(x if mask is None else x * mask)
        dA, dB = _adapter_gradients(rows, grads, A, B, ctx.scaling, gB)
        return dx, None, None, *(None for _ in 2 * A), *dA, *dB


def _linear(x: Tensor, W: Sequence[Tensor], b: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    biases = [None if bias is None else bias.to(x.dtype) for bias in b]
    return tuple(F.linear(x, w, bias) for w, bias in zip(W, biases, strict=True))


def _merge(
    W: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], s: float, dtype: torch.dtype
) -> list[Tensor]:
    """W + s B A of each layer, added up in W's and A's dtype and rounded once, to `dtype`.

    `out=` keeps autocast from adding up in its own dtype, which would swallow small updates.
    """
    return [
        torch.addmm(w, up, down, alpha=s, out=torch.empty_like(w)).to(dtype)
        for w, down, up in zip(W, A, B, strict=True)
    ]


def _input_gradient(grads: Sequence[Tensor], W: Sequence[Tensor]) -> Tensor:
    """The sum of g W over the layers: (T, in)."""
    dx = grads[0] @ W[0]
    for g, w in zip(grads[1:], W[1:], strict=True):
        dx.addmm_(g, w)
    return dx


def _through_B(grads: Sequence[Tensor], B: Sequence[Tensor], s: float) -> Tensor:
    """s g B of all layers side by side: (T, n * rank)."""
    products = [g @ (up * s).to(g.dtype) for g, up in zip(grads, B, strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def _adapter_gradients(
    x: Tensor,
    grads: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    s: float,
    gB: Tensor | None = None,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """dA and dB of each layer, from x (T, in) and its g (T, out)."""
    T, rank = x.shape[0], A[0].shape[0]
    if x.dtype == torch.bfloat16 and T * A[0].shape[1] * B[0].shape[0] <= DENSE_GRADIENT_LIMIT:
        dW = [(g.t() @ x).to(A[0].dtype) for g in grads]
        dA = [(up.t() @ d).mul_(s) for up, d in zip(B, dW, strict=True)]
        dB = [(d @ down.t()).mul_(s) for down, d in zip(A, dW, strict=True)]
        return dA, dB
    if gB is None:
        gB = _through_B(grads, B, s)
    h = F.linear(x, (torch.cat(A) * s).to(x.dtype))  # (T, n * rank)
    dA = _over_tokens(gB, x).split(rank)
    dB = [_over_tokens(hi, g).t() for hi, g in zip(h.split(rank, 1), grads, strict=True)]
    return dA, dB


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for a (T, m) and b (T, n), where m is small."""
    T = a.shape[0]
    if a.device.type != "cpu" or T < 2 * TOKEN_CHUNK or T % TOKEN_CHUNK:
        return a.t() @ b
    a, b = (t.reshape(T // TOKEN_CHUNK, TOKEN_CHUNK, -1) for t in (a, b))
    return torch.bmm(a.transpose(1, 2), b).sum(0)


def _rows(t: Tensor) -> Tensor:
    """(..., features) -> (T, features)."""
    return t.reshape(-1, t.shape[-1])


def _in_four(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    n = len(parameters) // 4
    return tuple(parameters[i : i + n] for i in range(0, 4 * n, n))


def _in_three(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    n = len(parameters) // 3
    return tuple(parameters[i : i + n] for i in range(0, 3 * n, n))
