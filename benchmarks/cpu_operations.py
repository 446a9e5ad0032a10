"""Time the operations for which this project takes another form than torch's first choice.

    python benchmarks/cpu_operations.py

Milliseconds, medians of 30, at the default model's shapes (batch 32, 128 tokens, width 256,
4 heads): GELU, dropout, LayerNorm, and causal attention forward and backward. And how far off the
gradients of LayerNorm's weights are, which are float32 in either dtype, as under autocast.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import device as hardware
from benchmarks.measure import at_least_one
from lora.dropout import dropout
from models.transformer import plain_attention

WARMUP = 3


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for i in range(WARMUP + repeats):
        started = time.perf_counter()
        function()
        if i >= WARMUP:
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def fused_attention(qkv: torch.Tensor, p: float) -> torch.Tensor:
    """torch's, on qkv (B, T, 3, H, D): (B, T, H * D)."""
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    return y.transpose(1, 2).flatten(2)


def with_backward(function: Callable[..., torch.Tensor], *inputs: torch.Tensor):
    """A call that runs `function` on the inputs, forward and backward."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    gradient = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, bias.shape, weight, bias)


def error_of_norm(dtype: torch.dtype) -> float:
    """The relative error of the gradient of LayerNorm's weight, for random inputs of `dtype`."""
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 4096, 256).to(dtype)

    def found(as_dtype: torch.dtype, weights: torch.dtype) -> torch.Tensor:
        weight = torch.ones(256, dtype=weights, requires_grad=True)
        y = norm(x.to(as_dtype), weight, torch.zeros(256, dtype=weights))
        return torch.autograd.grad(y, weight, gradient.to(as_dtype))[0].double()

    exact = found(torch.float64, torch.float64)
    return ((found(dtype, torch.float32) - exact).norm() / exact.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=at_least_one, default=30, help="calls that are timed (default 30)"
    )
    repeats = parser.parse_args().repeats
    hardware.keep_freed_memory()
    print(f"device: {hardware.device_name(torch.device('cpu'))}, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(32, 128, 1024, dtype=dtype)
        residual = torch.randn(32, 128, 256, dtype=dtype)
        qkv = torch.randn(32, 128, 3, 4, 64, dtype=dtype)
        rows = {
            "GELU, tanh approximation": with_backward(
                lambda x: F.gelu(x, approximate="tanh"), hidden
            ),
            "GELU, exact": with_backward(F.gelu, hidden),
            "dropout 0.2, torch's": with_backward(lambda x: F.dropout(x, 0.2), residual),
            "dropout 0.2, ours": with_backward(lambda x: dropout(x, 0.2, True), residual),
            "LayerNorm": with_backward(norm, residual, torch.ones(256), torch.zeros(256)),
            "attention, torch's": with_backward(lambda t: fused_attention(t, 0.0), qkv),
            "attention, plain": with_backward(lambda t: plain_attention(t, 0.0), qkv),
            "attention with dropout 0.2, torch's": with_backward(
                lambda t: fused_attention(t, 0.2), qkv
            ),
            "attention with dropout 0.2, plain and ours": with_backward(
                lambda t: plain_attention(t, 0.2), qkv
            ),
        }
        print(f"{str(dtype).removeprefix('torch.')}, forward and backward, ms:")
        for name, function in rows.items():
            print(f"   {name:44} {milliseconds(function, repeats):7.2f}")
        print(f"   error of LayerNorm's gradient: {error_of_norm(dtype):.1e}")


if __name__ == "__main__":
    main()
