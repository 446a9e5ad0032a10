"""Time and memory of a head with its loss: all logits at once, beside chunks of tokens.

    python benchmarks/head.py
    python benchmarks/head.py --sizes 2048x128256 --tokens 4096 --kinds frozen --rounds 2

Forward and backward of the head alone, for inputs whose gradient is needed. Both forms are
interleaved in one process. Memory is what a call adds to the peak of a process of its own, beyond
what it returns: the gradients.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.measure import at_least_one, interleaved, names_of, number_printed_by
from lora import LoRALinear
from lora.linear import apply_linear, factors_of
from ops.loss import linear_cross_entropy

KINDS = ("frozen", "frozen in bfloat16", "trained", "adapted")
SIZES = ("576x32000", "576x49152", "896x151936", "2048x128256")  # width x vocabulary
FORMS = ("plain", "chunks")


class Head:
    """A head of a kind, random inputs for it, and a step in either form."""

    def __init__(self, kind: str, size: str, tokens: int, dtype: torch.dtype) -> None:
        width, vocabulary = map(int, size.split("x"))
        torch.manual_seed(0)
        stored = torch.bfloat16 if kind == "frozen in bfloat16" else torch.float32
        self.layer: nn.Module = nn.Linear(width, vocabulary, bias=False, dtype=stored)
        self.layer.requires_grad_(kind == "trained")
        if kind == "adapted":
            self.layer = LoRALinear(self.layer)
            nn.init.normal_(self.layer.lora_B, std=0.02)
        self.dtype = dtype
        self.x = torch.randn(tokens, width, requires_grad=True)
        self.targets = torch.randint(vocabulary, (tokens,))
        self.trained = [self.x, *(p for p in self.layer.parameters() if p.requires_grad)]

    def step(self, form: str) -> tuple[Tensor, ...]:
        """The gradients of the mean loss."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            if form == "plain":
                loss = F.cross_entropy(apply_linear(self.layer, self.x).float(), self.targets)
            else:
                loss = linear_cross_entropy(self.x, self.targets, *factors_of(self.layer))
        return torch.autograd.grad(loss, self.trained)


def added_mib(head: Head, form: str) -> float:
    """The MiB that a step adds to the process's peak, beyond the gradients."""
    device = torch.device("cpu")
    before = hardware.peak_memory(device)
    returned = sum(t.nbytes for t in head.step(form)) / 2**20
    return hardware.peak_memory(device) - before - returned


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=names_of(SIZES), default=list(SIZES))
    parser.add_argument("--kinds", type=names_of(KINDS), default=list(KINDS))
    parser.add_argument("--tokens", type=at_least_one, default=2048, help="(default: 2048)")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="(default: 5)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    results.add_results_options(parser)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.memory_of is not None:
        print(added_mib(Head(args.kinds[0], args.sizes[0], args.tokens, dtype), args.memory_of))
        return
    common = [__file__, "--tokens", str(args.tokens), "--dtype", args.dtype]
    memory = {
        (size, kind, form): number_printed_by(
            [*common, "--sizes", size, "--kinds", kind, "--memory-of", form], "memory"
        )
        for size in args.sizes
        for kind in args.kinds
        for form in FORMS
    }
    hardware.keep_freed_memory()
    name = hardware.device_name(torch.device("cpu"))
    print(f"{args.tokens} tokens, {args.dtype}, {name}, torch {torch.__version__}")
    found = []
    for size in args.sizes:
        for kind in args.kinds:
            head = Head(kind, size, args.tokens, dtype)
            steps = {form: lambda form=form, head=head: head.step(form) for form in FORMS}
            times = interleaved(steps, args.rounds, warmup=1)
            ratios = [b / a for a, b in zip(times["plain"], times["chunks"], strict=True)]
            print(
                f"{size:12} {kind:20}"
                + "".join(
                    f"{form} {statistics.median(times[form]) * 1000:6.0f} ms "
                    f"{memory[size, kind, form]:6.0f} MiB   "
                    for form in FORMS
                )
                + f"time {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )
            row = {"head": size, "kind": kind, "tokens": f"{args.tokens:,}", "dtype": args.dtype}
            for form in FORMS:
                row[f"{form}_ms"] = statistics.median(times[form]) * 1000
                row[f"{form}_added_mib"] = memory[size, kind, form]
            found.append(row | results.ranged("time_ratio", ratios))
    results.write("head", found, torch.device("cpu"), args)


if __name__ == "__main__":
    main()
