"""LoRALinear: a frozen linear and its low-rank adapter, in the fewest and cheapest products.

The layer computes y = x W^T + b + s (x A^T) B^T with s = alpha / rank (Hu et al. 2021, "LoRA",
arXiv 2106.09685). Left to autograd that is slower than training W itself, for every adapter adds
small products and keeps intermediate results. Here one autograd function does it all:

    y  = x M^T + b              with M = W + s B A: the adapter costs no product of its own
    dx = g M
    dB = s g^T (x A^T)          both through the rank: never the (out, in) gradient of W,
    dA = s (g B)^T x            unless the layer is so small that one product beats four

Only x is kept for backward, and M where it is a copy in a lower precision.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# A product over fewer multiply-adds than this costs little more than its launch, so that dW = g^T x
# and two tiny products beat the four skinny ones.
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
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers]
    down = [layer.lora_A for layer in layers]
    up = [layer.lora_B for layer in layers]
    return _LoRAFunction.apply(x, first.scaling, *weights, *biases, *down, *up)


class _LoRAFunction(torch.autograd.Function):
    """n LoRA linears on one input; the arguments after `scaling` are n W, n b, n A and n B."""

    @staticmethod
    def forward(ctx, x: Tensor, scaling: float, *parameters: Tensor) -> tuple[Tensor, ...]:
        n = len(parameters) // 4
        W, b, A, B = (parameters[i * n : (i + 1) * n] for i in range(4))
        merged = [_merge(*wab, scaling, x.dtype) for wab in zip(W, A, B, strict=True)]
        ctx.n, ctx.scaling = n, scaling
        # A merged weight in x's dtype is kept only where making it again would cost a cast too.
        ctx.keeps_merged = x.dtype != W[0].dtype
        ctx.save_for_backward(x, *(merged if ctx.keeps_merged else W), *A, *B)
        bias = [None if bias is None else bias.to(x.dtype) for bias in b]
        return tuple(F.linear(x, m, bias) for m, bias in zip(merged, bias, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n, s = ctx.n, ctx.scaling
        x, *saved = ctx.saved_tensors
        W, A, B = saved[:n], saved[n : 2 * n], saved[2 * n :]
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # (T, in)
        grads = [g.reshape(-1, g.shape[-1]) for g in grads]  # (T, out) each
        dx = None
        if ctx.needs_input_grad[0]:
            if not ctx.keeps_merged:
                W = [_merge(*wab, s, x.dtype) for wab in zip(W, A, B, strict=True)]
            dx = grads[0] @ W[0]
            for g, w in zip(grads[1:], W[1:], strict=True):
                dx.addmm_(g, w)
            dx = dx.view(shape)
        if x.shape[0] * W[0].numel() <= DENSE_GRADIENT_LIMIT and x.dtype == torch.bfloat16:
            dW = [(g.t() @ x).to(A[0].dtype) for g in grads]
            dA = [(b.t() @ d).mul_(s) for b, d in zip(B, dW, strict=True)]
            dB = [(d @ a.t()).mul_(s) for a, d in zip(A, dW, strict=True)]
        else:
            h = F.linear(x, (torch.cat(A) * s).to(x.dtype))  # (T, n * rank)
            gB = [g @ (b * s).to(x.dtype) for g, b in zip(grads, B, strict=True)]  # (T, rank)
            rank = A[0].shape[0]
            dA = _over_tokens(torch.cat(gB, 1) if n > 1 else gB[0], x).split(rank)
            dB = [_over_tokens(hi, g).t() for hi, g in zip(h.split(rank, 1), grads, strict=True)]
        return dx, None, *(None,) * (2 * n), *dA, *dB


def _merge(W: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """W + scaling B A, added up in A's dtype and then rounded once to `dtype`.

    `out=` also keeps autocast from adding up in a lower precision, which would swallow the
    small updates.
    """
    out = torch.empty_like(W, dtype=A.dtype)
    return torch.addmm(W.to(A.dtype), B, A, alpha=scaling, out=out).to(dtype)


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for a (T, m) and b (T, n) with few m."""
    T = a.shape[0]
    if a.device.type != "cpu" or T < 2 * TOKEN_CHUNK or T % TOKEN_CHUNK:
        return a.t() @ b
    a, b = (t.view(T // TOKEN_CHUNK, TOKEN_CHUNK, -1) for t in (a, b))
    return torch.bmm(a.transpose(1, 2), b).sum(0)
