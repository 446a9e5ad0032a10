"""Muon: a step for a matrix is its momentum, made orthogonal (Jordan 2024).

A matrix of gradients has a few large singular values. With all of them set to 1, the directions
that a plain step would hardly take are learned as fast as the others.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hardware import processes

# A polynomial a x + b x^3 + c x^5 that, applied five times, takes each x from 0.003 to 1 to between
# 0.68 and 1.2, and not to exactly 1, which would take more steps (Jordan 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5

# Largest share of the Frobenius norm that a singular value may have, so that rounding does not put
# one above 1, where the polynomial would let it grow.
HEADROOM = 1.02

# 0.95 is usual; over the few hundred steps here 0.9 learns faster (`python benchmarks/recipe.py`).
MOMENTUM = 0.9

# Columns over rows from which the iteration on X X^T is the faster one.
WIDE = 2

# How many numbers are made orthogonal at a time, in about five tensors of this size.
TOGETHER = 2**24

# The root mean square of the numbers of a step of AdamW, as Liu et al. (2025, arXiv 2502.16982)
# found it: with steps of the same size one learning rate serves both.
ADAM_RMS = 0.2


def working_bytes(matrices: Iterable[Tensor], dtype: torch.dtype) -> int:
    """What a step holds beside the matrices, their momentum and their gradients."""
    numbers: dict[tuple[int, ...], int] = {}
    for matrix in matrices:
        shape = tuple(sorted(matrix.shape))
        numbers[shape] = numbers.get(shape, 0) + matrix.numel()
    most = max(
        (max(rows * columns, min(n, TOGETHER)) for (rows, columns), n in numbers.items()), default=0
    )
    return most * (torch.float32.itemsize + 4 * dtype.itemsize)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of groups with `orthogonal`, torch's fused AdamW for other groups.

    Args:
        groups: parameters, with `orthogonal` and what AdamW takes.
        lr: the learning rate of both.
        betas: AdamW's.
        dtype: of the products that make a matrix orthogonal; float32 or bfloat16.

    torch.optim.Muon, in torch from 2.9 on, does the same matrix by matrix in bfloat16, and takes
    about as long on a CPU that multiplies it (`python benchmarks/cpu_operations.py`). Here sharded
    matrices are made orthogonal as a whole, a CPU that would have to emulate bfloat16 has float32,
    and a GPU has few kernels to start, as matrices of one shape are one batch.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})
        self.dtype = dtype
        others = [group for group in self.param_groups if not group["orthogonal"]]
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=True) if others else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take a step with the gradients that the parameters have."""
        for group in self.param_groups:
            if group["orthogonal"]:
                self._orthogonal_step(group)
        if self.adamw is not None:  # both keep their state in one place, which loading replaces
            self.adamw.state = self.state
            self.adamw.param_groups = [g for g in self.param_groups if not g["orthogonal"]]
            self.adamw.step()

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        # Number by number, of each shard: sharded tensors lack some of this in torch 2.8.
        gradients = [processes.local(p.grad) for p in parameters]
        momenta = [processes.local(self.state[p]["momentum"]) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        shrunk = 1 - group["lr"] * group["weight_decay"]
        torch._foreach_mul_([processes.local(p) for p in parameters], shrunk)
        numbers_of: dict[tuple[int, ...], list[int]] = {}  # by shape, with the shorter side first
        for i, p in enumerate(parameters):
            numbers_of.setdefault(tuple(sorted(p.shape)), []).append(i)
        for (rows, columns), numbers in numbers_of.items():
            n = max(1, TOGETHER // (rows * columns))
            for some in (numbers[i : i + n] for i in range(0, len(numbers), n)):
                ahead = torch._foreach_lerp(  # Nesterov's
                    [gradients[i] for i in some], [momenta[i] for i in some], MOMENTUM
                )
                of_some = [parameters[i] for i in some]
                whole = map(processes.gathered, ahead, of_some)
                wide = torch.stack([m if m.shape[1] == columns else m.T for m in whole])
                del ahead
                steps = orthogonalized(wide, self.dtype).to(wide.dtype).unbind()
                for p, step in zip(of_some, steps, strict=True):
                    step = step if p.shape[1] == columns else step.T
                    size = ADAM_RMS * columns**0.5
                    p.sub_(processes.shard_like(step, p), alpha=group["lr"] * size)


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrices with all their singular values near 1: of U S V^T about U V^T.

    Args:
        matrices: (n, rows, columns), with no more rows than columns.
        dtype: float32 or bfloat16, of the products.

    Newton and Schulz's iteration with Jordan's polynomial, X <- a X + (b A + c A A) X, A = X X^T.
    As all of these commute, it can be done on A alone (rows x rows), with one product for X at the
    end, which saves time for wide matrices. In bfloat16 the error would be too large, and the
    products cost less.
    """
    a, b, c = COEFFICIENTS
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    x = (matrices / (norms * HEADROOM).clamp_min(1e-30)).to(dtype)
    if dtype != torch.float32 or x.shape[2] < WIDE * x.shape[1]:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    gram, product = x @ x.mT, None
    for i in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if i + 1 < ITERATIONS:
            gram = factor @ gram @ factor
    return product @ x
