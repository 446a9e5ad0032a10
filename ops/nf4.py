"""NF4: frozen matrices in 4.127 bits a number (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

    number   one of 16 LEVELS times the scale of its block, which is 64 numbers of the flat matrix
    scale    the largest magnitude in a block, kept as one of 256 levels times the reach of its
             group, which is 256 blocks, plus the mean of all scales

The values are those of bitsandbytes with compress_statistics=True, to the bit. Its own CPU kernel
alone differs: it takes a neighbouring level where two are almost equally near, for 0.2% of scales.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

BLOCK = 64  # numbers that share a scale
GROUP = 256  # scales that share a reach
PART = 2**20  # numbers that are quantized at a time

# Blocks that are dequantized at a time: a CPU's caches hold the steps between for so many, while a
# GPU starts a kernel for each step, which should be few and take little memory.
BLOCKS_ON_CPU = 2**13
BLOCKS_ON_GPU = 2**18
BLOCKS_IN_ROW = 16  # that a thread looks up at least

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact 0: appendix E of the paper.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

aten = torch.ops.aten


class NF4(Tensor):
    """A matrix that lies in NF4. `quantize` makes it, and `dequantize` gives its values.

    It has the shape of the matrix and the dtype that the matrix had. It moves between devices; any
    other operation gets its values, as a plain tensor of that dtype. It cannot be written to.

    Attributes:
        codes: two numbers a byte, the first in the upper half, (blocks, BLOCK / 2) uint8.
        scales: (blocks,) uint8.
        reaches: (groups,) float32.
        mean: () float32.
    """

    PARTS = ("codes", "scales", "reaches", "mean")

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, reaches: Tensor, mean: Tensor, like: Tensor
    ) -> "NF4":
        matrix = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=codes.device
        )
        matrix.codes, matrix.scales, matrix.reaches, matrix.mean = codes, scales, reaches, mean
        return matrix

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return sum(getattr(self, part).nbytes for part in self.PARTS)

    def each(self, function: Callable[[Tensor], Tensor]) -> "NF4":
        """The matrix with a function applied to each of its parts."""
        return NF4(*(function(getattr(self, part)) for part in self.PARTS), self)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (aten.detach.default, aten.clone.default):
            return args[0].each(function)
        if function is aten._to_copy.default:
            device = kwargs.get("device") or args[0].device
            dtype = kwargs.get("dtype") or args[0].dtype
            if dtype != args[0].dtype:
                return dequantize(args[0], dtype).to(device)
            return args[0].each(lambda part: part.to(device, copy=True))
        if function._schema.is_mutable:
            raise TypeError(f"{function} writes to a tensor, which weights in NF4 do not allow")
        args, kwargs = tree_map_only(NF4, lambda W: dequantize(W, W.dtype), (args, kwargs))
        return function(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], Tensor]:
        return list(self.PARTS), self.dtype

    @staticmethod
    def __tensor_unflatten__(parts: dict, dtype: torch.dtype, shape: Any, stride: Any) -> "NF4":
        like = torch.empty(shape, dtype=dtype, device="meta")
        return NF4(*(parts[name] for name in NF4.PARTS), like)


@torch.no_grad()
def quantize(W: Tensor) -> NF4:
    """A matrix (rows, columns) of floating-point numbers in NF4, on its device.

    The last block is filled up with zeros, so any shape will do.
    """
    numbers, codes, scales = W.reshape(-1), [], []
    for part in numbers.split(PART):
        blocks = F.pad(part.float(), (0, -len(part) % BLOCK)).view(-1, BLOCK)
        found, scale = _nearest(blocks, torch.tensor(LEVELS))
        codes.append(found[:, ::2] << 4 | found[:, 1::2])
        scales.append(scale)
    scale = torch.cat(scales)
    mean = scale.mean()
    groups = F.pad(scale - mean, (0, -len(scale) % GROUP)).view(-1, GROUP)
    found, reaches = _nearest(groups, _scale_levels())
    return NF4(torch.cat(codes), found.view(-1)[: len(scale)].clone(), reaches, mean, W)


def _nearest(rows: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `levels`, in ascending order, is nearest to each number over the largest magnitude
    of its row: uint8 of the shape of rows (n, numbers), and those magnitudes (n,)."""
    largest = rows.abs().amax(1)
    # bitsandbytes multiplies by the reciprocal too; a row of zeros stays zero.
    scaled = rows * (1 / largest.clamp(min=1e-38))[:, None]
    middles = (levels[:-1] + levels[1:]) / 2
    if len(middles) > 16:
        return torch.bucketize(scaled, middles.to(rows.device)).to(torch.uint8), largest
    found = torch.zeros_like(rows, dtype=torch.uint8)
    for middle in middles.tolist():  # three times as fast on a CPU as bucketize is
        found += scaled > middle
    return found, largest


def dequantize(W: NF4, dtype: torch.dtype) -> Tensor:
    """The values of W, computed in float32 and rounded once: (rows, columns) in `dtype`."""
    return next(dequantize_rows(W, max(1, W.numel()), dtype))


def dequantize_rows(W: NF4, numbers: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The values of W, about so many numbers at a time: some rows, (n, columns) in `dtype`."""
    columns = W.shape[1]
    scales = _scales(W)
    kernel = _kernel() if has_kernel(W.device) else None
    whole = BLOCK // math.gcd(BLOCK, columns)  # so many rows end with a block
    n_rows = max(1, -(-numbers // (columns * whole))) * whole
    for start in range(0, len(W), n_rows):
        n = min(n_rows, len(W) - start)
        first, last = start * columns // BLOCK, -(-(start + n) * columns // BLOCK)
        shape = (last - first, BLOCK)
        if kernel is not None:
            found = kernel(W.codes[first:last], scales[first:last], BLOCK, "nf4", shape, dtype)
            yield found.view(-1)[: n * columns].view(n, columns)
            continue
        values = torch.empty(shape, dtype=dtype, device=W.device)
        _look_up(W.codes[first:last], scales[first:last], values)
        yield values.view(-1)[: n * columns].view(n, columns)


def _scales(W: NF4) -> Tensor:
    """The scale of each block: (blocks,) float32."""
    n, groups = len(W.scales), len(W.reaches)
    scales = _table(_scale_levels, W.device).index_select(0, W.scales.int())
    if n == groups * GROUP:
        return scales.view(groups, GROUP).mul_(W.reaches[:, None]).add_(W.mean).view(n)
    return scales.mul_(W.reaches.repeat_interleave(GROUP)[:n]).add_(W.mean)


def _look_up(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    """Write the values of blocks with these codes and scales to `values` (blocks, BLOCK)."""
    pairs = _table(_pairs, codes.device)
    together = BLOCKS_ON_CPU if codes.device.type == "cpu" else BLOCKS_ON_GPU
    for i in range(0, len(codes), together):
        some, part = codes[i : i + together], values[i : i + together]
        # `gather` works on rows in parallel on a CPU, as index_select of one dimension does not.
        rows = some.view(len(some) // math.gcd(len(some), BLOCKS_IN_ROW), -1)
        found = pairs.expand(len(rows), -1).gather(1, rows.long()).view(torch.float32)
        part.copy_(found.view(part.shape).mul_(scales[i : i + together, None]))


def has_kernel(device: torch.device) -> bool:
    """Whether bitsandbytes' kernel for this device is the faster way, where it is installed."""
    return device.type == "cuda"


@functools.cache
def _kernel() -> Callable[..., Tensor] | None:
    """bitsandbytes' kernel for a GPU, where that package is installed: the same values at once."""
    try:
        import bitsandbytes  # noqa: F401  it registers the operation

        return torch.ops.bitsandbytes.dequantize_4bit.default
    except (ImportError, AttributeError, RuntimeError):
        return None


def _scale_levels() -> Tensor:
    """The 256 levels of scales: 0, 1, and on each side 127 whose steps grow with their size.

    The dynamic data type of Dettmers 2016 (arXiv 1511.04561): (256,) float32, ascending.
    """
    decades = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    sides = [10.0 ** (i - 6) * ((d[:-1] + d[1:]) / 2) for i, d in enumerate(decades)]
    side = torch.cat(sides)
    return torch.cat([-side, side, torch.tensor([0.0, 1.0])]).sort().values


def _pairs() -> Tensor:
    """The two levels that each byte stands for, as one element of 8 bytes: (256,) int64.

    One look-up then reads two numbers, in the time of one.
    """
    levels = torch.tensor(LEVELS)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)  # (256, 2)
    return pairs.view(torch.int64).view(-1)


@functools.cache
def _table(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """The table that `make` makes, on a device."""
    return make().to(device)
