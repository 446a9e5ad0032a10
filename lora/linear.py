"""LoRALinear: a frozen linear and its low-rank adapter, in the fewest and cheapest products.

The layer computes `lora_reference`, with s = alpha / rank. Left to autograd that is slower than
training W itself, for every adapter adds small products and keeps intermediate results. Here it
takes one of two forms:

    merged      y = x M^T + b  and  dx = g M      with M = W + s B A made for each step
    two paths   y = x W^T + b + s (x A^T) B^T     where making M costs more than it saves:
                dx = g W + s (g B) A              few tokens, or dropout between x and A

    both        dB = s g^T (x A^T)  and  dA = s (g B)^T x

Kept for backward is x, or in its place what it is quickly made of again. With dropout it is what
the mask left of x, and a byte an element for the mask. M or W is kept too where it was cast for the
step, and a small M in a small batch.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.dropout import draw_numbers, dropout, mask_of
from ops.products import (
    Tensors,
    base_slices,
    base_weight,
    block_diagonal,
    concatenated,
    differentiable_once,
    float32_product,
    joined,
    number_size,
    product_dtype,
    rows_of,
    scaled_product,
    sums_to_float32,
)

# The constants are set on CPUs. benchmarks/cpu_operations.py has a section for each, under the name
# that is given here, which compares their values.

# A float32 product of a rank-wide matrix is faster as a batch of this many products, each over its
# part of the tokens, where these are enough (section "parts").
PARTS = 8
ENOUGH_TOKENS = 512

# With dropout a CPU computes for up to this many tokens at a time: a mask takes little memory, and
# what one operation has written is in the cache for the next (section "slices").
SLICE = 1024

# Whether a group of layers is one product: see `stacking_pays` (section "groups"). It stacks the
# weights, and in backward the outputs' gradients, which must take less than it saves.
FEW_TOKENS = 16  # fewer are too few
WIDE_GROUP = 4  # outputs for each input from which a group is too wide
# For layers of unequal widths, and for plain ones without biases:
OUTPUTS_PER_TOKEN = 8  # more outputs for each token are too many
PLAIN_GROUP = 2**20  # more weights of plain layers are too many

# Merged weights of up to this many numbers a layer are kept for backward of up to so many tokens,
# where the time to make them again counts more than their memory (section "kept weights").
SMALL_WEIGHT = 2**16
SMALL_BATCH = 1024


def lora_reference(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """LoRA in plain operations: y = x W^T + b + s (x A^T) B^T (Hu et al. 2021, arXiv 2106.09685).

    Everything below computes this faster, and the tests compare all of it with this.

    Args:
        x: (..., in_features).
        W: the frozen weight, (out_features, in_features).
        b: the frozen bias, (out_features,), or None.
        A: trained, (rank, in_features).
        B: trained, (out_features, rank).
        scaling: s, which is alpha / rank.

    Returns y (..., out_features).
    """
    base = F.linear(x, W, b)  # x W^T + b
    update = F.linear(F.linear(x, A), B)  # (x A^T) B^T
    return base + scaling * update


class LoRALinear(nn.Module):
    """A linear layer with frozen `weight` and `bias` and trainable `lora_A` and `lora_B`.

    The state dict is that of `linear`, whose parameters are adopted and not copied, plus
    `lora_A` (rank, in_features) and `lora_B` (out_features, rank). A is Kaiming-uniform and B is
    zero, so that the layer equals `linear` before the first step, to the bit.

    Args:
        linear: the layer to adapt.
        rank: columns of B and rows of A, at least 1.
        alpha: the adapter is scaled by alpha / rank.
        dropout: probability of dropping an element of the adapter's input while training, on a CPU
            rounded to a multiple of 1/256, and at least that if not 0.

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
        self.computes = True  # see `without_output`
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

    def set_rank(self, rank: int) -> None:
        """Take new, uninitialized parameters of this rank, unless it is the layer's rank."""
        if rank != self.rank:
            A, B = self.lora_A, self.lora_B
            self.rank = rank
            self.lora_A = nn.Parameter(A.new_empty(rank, self.in_features), A.requires_grad)
            self.lora_B = nn.Parameter(B.new_empty(self.out_features, rank), B.requires_grad)

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


@contextlib.contextmanager
def without_output(layer: nn.Module) -> Iterator[None]:
    """A context in which a LoRALinear keeps what backward needs, and its outputs have no values.

    A block that is computed again in backward needs no more of its last product. torch stops there
    too, but only after the product.
    """
    if not isinstance(layer, LoRALinear):
        yield
        return
    layer.computes = False
    try:
        yield
    finally:
        layer.computes = True


class Made(NamedTuple):
    """A tensor that is quick to make again, `function(*tensors)`, in place of keeping it."""

    value: Tensor
    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def made(function: Callable[..., Tensor], *tensors: Tensor) -> Made:
    """What `function` makes of `tensors`, which backward needs anyway and which must not change."""
    return Made(function(*tensors), function, tensors)


def grouped_linear(x: Tensor | Made, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What each of `layers` makes of x (..., in_features): one (..., out_features) for each.

    LoRALinears in two paths make x again in backward where it is `made`.

    Where that is faster than one by one they are one product, and the outputs are views of it.
    Layers in one product are plain linears, or LoRALinears of one mode, rank, scaling and dropout.
    Plain ones that are frozen in a lower precision than the product's are never stacked.
    All of them have a bias or none, and none has hooks, which would not run. LoRALinears in one
    product share the dropout's mask, since they share its input.
    """
    source, x = (x, x.value) if isinstance(x, Made) else (None, x)
    tokens = x.numel() // max(1, x.shape[-1])
    alike = _are_alike(layers)
    one_by_one = any(is_frozen_below(product_dtype(x), layer) for layer in layers)
    if one_by_one or not (alike and stacking_pays(tokens, layers)):
        if source is not None and alike and type(layers[0]) is LoRALinear:
            return tuple(_adapted(x, [layer], source) for layer in layers)
        return tuple(apply_linear(layer, x) for layer in layers)
    widths = [layer.out_features for layer in layers]
    if type(layers[0]) is LoRALinear:
        return _adapted(x, layers, source).split(widths, -1)
    weight = joined([layer.weight for layer in layers], product_dtype(x))
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = joined(biases, product_dtype(x), 0) if biases else None
    return F.linear(x, weight, bias).split(widths, -1)


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), where a plain linear may be frozen in a lower precision than the product's."""
    if is_frozen_below(product_dtype(x), layer):
        return _Frozen.apply(x.to(product_dtype(x)), layer.weight, layer.bias)
    return layer(x)


def factors_of(
    layer: nn.Module,
) -> tuple[Tensor, Tensor | None, Tensor | None, float] | None:
    """W, A, B and s of a layer whose call computes x W^T + s (x A^T) B^T and does nothing else.

    A and B of a plain linear are None. None where a bias, hooks or dropout are beside them.
    """
    if getattr(layer, "bias", None) is not None or has_hooks(layer):
        return None
    if type(layer) is nn.Linear:
        return layer.weight, None, None, 1.0
    if type(layer) is LoRALinear and not (layer.training and layer.dropout > 0.0):
        return layer.weight, layer.lora_A, layer.lora_B, layer.scaling
    return None


def is_frozen(layer: nn.Module) -> bool:
    """Whether a layer is a frozen plain linear, whose weight says all that calling it would do."""
    return type(layer) is nn.Linear and not layer.weight.requires_grad and not has_hooks(layer)


def is_frozen_below(dtype: torch.dtype, layer: nn.Module) -> bool:
    """Whether a layer is a frozen plain linear in a lower precision than `dtype`."""
    return is_frozen(layer) and number_size(layer.weight) < dtype.itemsize


def _are_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether `layers` can be one product."""

    def character(layer: nn.Module) -> tuple:
        if type(layer) is LoRALinear:
            return (layer.rank, layer.alpha, layer.dropout, layer.training, layer.bias is None)
        return (layer.bias is None,)

    kind = type(layers[0])
    return kind in (nn.Linear, LoRALinear) and all(
        type(layer) is kind and character(layer) == character(layers[0]) and not has_hooks(layer)
        for layer in layers
    )


def has_hooks(layer: nn.Module) -> bool:
    """Whether calling a layer does more than its forward."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def stacking_pays(tokens: int, layers: Sequence[nn.Module]) -> bool:
    """Whether layers that are alike are faster as one product than one by one.

    One product reads x once, and casts it and draws its dropout once. Stacking copies the weights
    for it, and in backward the gradients of the outputs.
    """
    if len(layers) == 1:
        return False
    n_in, widths = layers[0].in_features, [layer.out_features for layer in layers]
    n_out, adapted = sum(widths), type(layers[0]) is LoRALinear
    if tokens < FEW_TOKENS or n_out >= WIDE_GROUP * n_in:
        return False
    if len(set(widths)) == 1 and (adapted or layers[0].bias is not None):
        return True
    return n_out <= OUTPUTS_PER_TOKEN * tokens and (adapted or n_in * n_out <= PLAIN_GROUP)


def _adapted(x: Tensor, layers: Sequence[LoRALinear], source: Made | None = None) -> Tensor:
    """The outputs, side by side, of LoRALinears that share x, mode, rank, scaling and dropout.

    `source` is how x was made, if backward is to make it again.
    """
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; LoRALinear takes floating-point numbers")
    x = x.to(product_dtype(x))
    first = layers[0]
    tokens = x.numel() // max(1, first.in_features)
    p = first.dropout if first.training else 0.0
    W = [layer.weight for layer in layers]
    b = [layer.bias for layer in layers if layer.bias is not None]
    A = [layer.lora_A for layer in layers]
    B = [layer.lora_B for layer in layers]
    bias = joined(b, x.dtype, 0) if b else None
    if any(t.requires_grad for t in W + b):
        return _by_autograd(x, first.scaling, bias, p, W, A, B)
    if p == 0.0 and all(merging_pays(tokens, layer, x.dtype) for layer in layers):
        return _Merged.apply(x, first.scaling, bias, first.computes, *W, *A, *B)
    numbers, lowest, keep_rate = draw_numbers(rows_of(x), p, bits=8) if p > 0.0 else (None, 0, 1.0)
    if numbers is not None or torch.compiler.is_compiling():
        source = None
    scaling, more = first.scaling / keep_rate, (numbers, lowest, source, first.computes)
    return _TwoPaths.apply(x, scaling, bias, *more, *W, *A, *B)


def lies_below_adapter(layer: LoRALinear) -> bool:
    """Whether the frozen weight lies in a lower precision than the adapter, such as in NF4."""
    return number_size(layer.weight) < layer.lora_A.itemsize


def merging_pays(tokens: int, layer: LoRALinear, dtype: torch.dtype) -> bool:
    """Whether making M = W + s B A moves fewer bytes than two paths, for inputs of `dtype`.

    Making M reads and writes in * out numbers: forward and backward, or forward only where M is
    then cast to `dtype`, which reads and writes them again. Two paths read and write the output,
    tokens * out numbers, once more in forward, and dx, tokens * in, once more in backward.

    A base in a lower precision than its adapter is never merged: the sum would be rounded to
    steps larger than the adapter's.
    """
    W, n_in, n_out = layer.weight, layer.in_features, layer.out_features
    if lies_below_adapter(layer):
        return False
    merging = n_in * n_out * (4 if dtype == W.dtype else 3) * W.element_size()
    merging += n_in * n_out * (0 if dtype == W.dtype else dtype.itemsize)
    return merging < tokens * (n_in + n_out) * 2 * dtype.itemsize


def _by_autograd(
    x: Tensor, s: float, bias: Tensor | None, p: float, W: Tensors, A: Tensors, B: Tensors
) -> Tensor:
    """Two paths in autograd's own operations, for a base that was made trainable after all."""
    h = F.linear(dropout(x, p, training=True), concatenated(A).to(x.dtype))
    adapters = F.linear(h, block_diagonal(B).to(x.dtype))
    return F.linear(x, base_weight(W, x.dtype), bias) + s * adapters


class _Frozen(torch.autograd.Function):
    """x W^T + b of a frozen linear, whose W is cast to the dtype of x anew in backward: autograd
    would keep the cast one."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        y = x.new_empty(*x.shape[:-1], len(W))
        bias = x.new_zeros(()) if b is None else b.to(x.dtype)
        for part, weight in base_slices([W], x.dtype):
            out = rows_of(y)[:, part]
            torch.addmm(bias if b is None else bias[part], rows_of(x), weight.t(), out=out)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (W,) = ctx.saved_tensors
        dx = grad.new_zeros(*grad.shape[:-1], W.shape[1])
        for part, weight in base_slices([W], grad.dtype):
            rows_of(dx).addmm_(rows_of(grad)[:, part], weight)
        return dx, None, None


class _Merged(torch.autograd.Function):
    """n LoRA linears on one input, outputs side by side; `parameters` are n W, n A and n B."""

    @staticmethod
    def forward(
        ctx, x: Tensor, scaling: float, bias: Tensor | None, computes: bool, *parameters: Tensor
    ) -> Tensor:
        W, A, B = _in_three(parameters)
        ctx.scaling = scaling
        # A large one that was not cast is made again in backward, as memory is dear.
        small = max(w.numel() for w in W) <= SMALL_WEIGHT and x.numel() <= SMALL_BATCH * x.shape[-1]
        keeps_M = small or x.dtype != W[0].dtype
        M = _merge(W, A, B, scaling).to(x.dtype) if computes or keeps_M else None
        ctx.save_for_backward(x, M if keeps_M else None, *parameters)
        return F.linear(x, M, bias) if computes else x.new_empty(*x.shape[:-1], sum(map(len, W)))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, M, *parameters = ctx.saved_tensors
        W, A, B = _in_three(parameters)
        g = rows_of(grad)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ (_merge(W, A, B, ctx.scaling) if M is None else M)).view(x.shape)
        dA, dB, _ = _adapter_gradients(rows_of(x), g, A, B, ctx.scaling)
        return dx, None, None, None, *(None for _ in W), *dA, *dB


class _TwoPaths(torch.autograd.Function):
    """n LoRA linears on one input, outputs side by side, with products for base and adapters each.

    Elements whose number in `numbers`, if any, is below `lowest` are dropped from the adapters'
    input; the scale of the others is in `scaling`. The base's path needs no x for backward, so
    that what is kept is the adapters' input, or what it is made of again.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        scaling: float,
        bias: Tensor | None,
        numbers: Tensor | None,
        lowest: int,
        source: Made | None,
        computes: bool,
        *parameters: Tensor,
    ) -> Tensor:
        W, A, B = _in_three(parameters)
        # What is cast to fewer bytes is kept; what is cast to more is cast anew in backward.
        cast = base_weight(W, x.dtype) if any(x.itemsize < number_size(w) for w in W) else None
        down = concatenated(A).to(x.dtype)
        up = block_diagonal(B).to(x.dtype).t()  # (n * rank, sum of out)
        y = x.new_empty(*x.shape[:-1], up.shape[1])
        rows, outputs = rows_of(x), rows_of(y)
        adapter_input = rows if numbers is None else torch.empty_like(rows)
        bias = y.new_zeros(up.shape[1]) if bias is None else bias
        for part in _slices(rows, numbers):
            if numbers is not None:
                mask_of(numbers[part], lowest, out=adapter_input[part]).mul_(rows[part])
            if not computes:
                continue
            h = scaled_product(scaling, adapter_input[part], down.t())  # (tokens, n * rank)
            # The adapters first: where B is zero they are the bias, and the base adds onto it as
            # F.linear does, to the bit.
            torch.addmm(bias, h, up, out=outputs[part])
            for some, weight in base_slices(W if cast is None else [cast], x.dtype):
                outputs[part, some].addmm_(rows[part], weight.t())
        ctx.scaling, ctx.lowest, ctx.shape, ctx.dtype = scaling, lowest, x.shape, x.dtype
        ctx.function, kept = None, (x if numbers is None else adapter_input,)
        if source is not None:
            _, ctx.function, kept = source
        ctx.n_parameters = len(parameters)
        ctx.save_for_backward(numbers, cast, *parameters, *kept)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        numbers, cast, *tensors = ctx.saved_tensors
        W, A, B = _in_three(tensors[: ctx.n_parameters])
        kept = tensors[ctx.n_parameters :]
        x = kept[0] if ctx.function is None else ctx.function(*kept).to(ctx.dtype)
        x, g = rows_of(x), rows_of(grad)
        dA, dB, gB = _adapter_gradients(x, g, A, B, ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            down = concatenated(A).to(x.dtype)
            gB = gB.mT.reshape(-1, len(down))  # (T, n * rank)
            dx = torch.empty_like(x)
            for part in _slices(x, numbers):
                if numbers is None:
                    torch.mm(gB[part], down, out=dx[part])
                else:
                    mask_of(numbers[part], ctx.lowest, out=dx[part]).mul_(gB[part] @ down)
                for some, weight in base_slices(W if cast is None else [cast], x.dtype):
                    dx[part].addmm_(g[part, some], weight)
            dx = dx.view(ctx.shape)
        return dx, *(None for _ in range(6)), *(None for _ in W), *dA, *dB


def _slices(rows: Tensor, numbers: Tensor | None) -> list[slice]:
    """Which tokens of rows (T, features) to compute with at a time.

    Slices are of about equal sizes, since a product of few tokens may round differently. Before the
    first step the layer's output must be that of the base, to the bit.
    """
    size = max(1, len(rows))
    if numbers is not None and rows.device.type == "cpu":
        size = math.ceil(size / math.ceil(size / SLICE))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _merge(W: Tensors, A: Tensors, B: Tensors, s: float) -> Tensor:
    """W + s B A of each layer, one below the other, added up in W's dtype: (sum of out, in).

    In place, which keeps autocast from adding up in its own dtype and swallowing small updates.
    """
    M = base_weight(W, W[0].dtype, copy=True)
    if len(W) == 1:
        M.addmm_(B[0], A[0], alpha=s)
    elif len({len(w) for w in W}) == 1:
        M.unflatten(0, (len(W), -1)).baddbmm_(torch.stack(B), torch.stack(A), alpha=s)
    else:
        for part, a, b in zip(M.split([len(w) for w in W]), A, B, strict=True):
            part.addmm_(b, a, alpha=s)
    return M


def _adapter_gradients(
    x: Tensor, g: Tensor, A: Tensors, B: Tensors, s: float
) -> tuple[Tensors, Tensors, Tensor]:
    """dA and dB of each layer, and s B^T g^T, from x (T, in) and g (T, sum of out).

    In the order of operands that a CPU does fastest: dA = (s B^T g^T) x, dB^T = (s A x^T) g. In
    PARTS products s B^T g^T is (PARTS, n * rank, T / PARTS), else (n * rank, T).
    """
    n, rank, T = len(B), B[0].shape[1], len(x)
    down, ups = concatenated(A).to(x.dtype), [up.to(x.dtype).t() for up in B]
    in_parts = T >= ENOUGH_TOKENS and T % PARTS == 0
    if in_parts and x.device.type == "cpu" and x.dtype == torch.float32:
        x, g = (t.unflatten(0, (PARTS, -1)) for t in (x, g))
        down, *ups = (t.expand(PARTS, *t.shape) for t in (down, *ups))
    gs = g.split([len(up) for up in B], -1) if n > 1 else [g]
    gB = concatenated(
        [scaled_product(s, up, g_layer.mT) for up, g_layer in zip(ups, gs, strict=True)]
    )
    h = scaled_product(s, down, x.mT)  # as gB
    hs = h.split(rank, -2) if n > 1 else [h]
    pairs = zip(hs, gs, strict=True)
    if x.is_cuda:  # where dB may as well come as its parameter lies
        product = float32_product if sums_to_float32(x) else torch.mm
        dB = [product(g_layer.t(), h_layer.t()) for h_layer, g_layer in pairs]
        return product(gB, x).split(rank), dB, gB
    product = torch.mm if x.dim() == 2 else torch.bmm
    dA, dB = product(gB, x), [product(h_layer, g_layer) for h_layer, g_layer in pairs]
    if x.dim() == 3:
        dA, dB = dA.sum(0), [t.sum(0) for t in dB]
    return dA.split(rank) if n > 1 else [dA], [t.t() for t in dB], gB


def _in_three(parameters: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    n = len(parameters) // 3
    return parameters[:n], parameters[n : 2 * n], parameters[2 * n :]
