"""Small matrix products, their dtypes and the joining of their factors, for models and LoRA."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ops.nf4 import NF4, dequantize, dequantize_rows

Tensors = Sequence[Tensor]

# The numbers of a frozen weight that a CPU casts at a time.
CAST = 2**20
DEQUANTIZED = 2**24  # of one in NF4


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x: autocast's, where that is on and x is not float64."""
    kind = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype  # the meta device has no autocast
    return torch.get_autocast_dtype(kind)


def number_size(W: Tensor) -> float:
    """The bytes that a number of a weight takes: in NF4 about half a byte."""
    return 0.5 if isinstance(W, NF4) else W.itemsize


def base_weight(W: Tensors, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """The frozen weights of layers on one input, one below the other: (sum of out, in) in `dtype`.

    Every form of the arithmetic takes its base from here or from `base_slices`, in forward and
    again in backward. With `copy` the result may be written to; else it can be the single weight
    itself.
    """
    W = [dequantize(w, dtype) if isinstance(w, NF4) else w for w in W]
    return W[0].to(dtype, copy=copy) if len(W) == 1 else joined(W, dtype)


def base_slices(W: Tensors, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """What `base_weight` gives, in slices of outputs: which, and their weights (outputs, in).

    It is one slice, but for weights that a CPU casts to more bytes: these come some at a time,
    which take no memory, and of which the product finds some in the cache.
    """
    if W[0].device.type != "cpu" or not all(number_size(w) < dtype.itemsize for w in W):
        yield slice(None), base_weight(W, dtype)
        return
    start = 0
    for w in W:
        for rows in _cast_rows(w, dtype):
            yield slice(start, start + len(rows)), rows
            start += len(rows)


def _cast_rows(W: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The weight in `dtype`, some rows at a time: (outputs, in)."""
    if isinstance(W, NF4):
        return dequantize_rows(W, DEQUANTIZED, dtype)
    return (rows.to(dtype) for rows in W.split(max(1, CAST // W.shape[1])))


def scaled_product(s: float, a: Tensor, b: Tensor) -> Tensor:
    """s a b, of matrices or of batches of them, in one operation."""
    product = a.new_empty(*a.shape[:-1], b.shape[-1])
    multiply = product.addmm_ if a.dim() == 2 else product.baddbmm_
    return multiply(a, b, beta=0, alpha=s)


# a b of bfloat16 matrices in float32, on a GPU for which `sums_to_float32` holds.
float32_product = functools.partial(torch.mm, out_dtype=torch.float32)


def sums_to_float32(x: Tensor) -> bool:
    """Whether x's GPU gives a product of bfloat16 in float32, without rounding or a cast."""
    if x.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_properties(x.device).major >= 8


def rows_of(t: Tensor) -> Tensor:
    """(..., features) -> (T, features)."""
    return t.reshape(-1, t.shape[-1])


def concatenated(tensors: Tensors, dim: int = -2) -> Tensor:
    """The tensors one below the other, or along `dim`; a single one as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def joined(tensors: Tensors, dtype: torch.dtype, dim: int = -2) -> Tensor:
    """`concatenated`, in `dtype`. Half precisions are cast before: autocast to one of them refuses
    to join tensors of the other."""
    if tensors[0].itemsize < 4:
        tensors = [t.to(dtype) for t in tensors]
    return concatenated(tensors, dim).to(dtype)


def block_diagonal(matrices: Tensors) -> Tensor:
    """The matrices on the diagonal, zeros elsewhere; a single one as it is, without a copy."""
    return matrices[0] if len(matrices) == 1 else torch.block_diag(*matrices)


def differentiable_once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backward function that raises when its gradients are to be differentiated again.

    torch's once_differentiable lets create_graph=True pass where the incoming gradient is constant,
    as a sum's is, and second derivatives would silently lack this function's part.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients: Tensor) -> tuple:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the gradients of LoRALinear and of what is in ops/ cannot be differentiated "
                "again, as create_graph=True asks"
            )
        return backward(ctx, *gradients)

    return checked
