"""Adapters in use: generation with and without the cache, and switching, combining, merging.

    python benchmarks/serving.py [--quick]

Generation is of one sequence with the default model (3.3M, dropout off, float32) at a context of
256 tokens: it fills the context from one token on. `cache` computes the new token only,
`recompute` all tokens so far; both give the same logits, and the largest difference is printed. The
two take turns; the ratio is the median of the pairwise ratios. Adapter operations are on the 25M
model, rank 8 on every linear with the embeddings, in float32: medians. --quick does all of it
once, on the 0.8M model, to see that it works.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.step_time import SEED, SIZES, VOCAB_SIZE, Size
from lora import (
    adapter_state,
    combine_adapters,
    merge_adapter,
    switch_adapter,
    take_adapter,
    unmerge_adapter,
)
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

CONTEXT = 256


def build(size: Size, use_lora: bool) -> BigramLanguageModelLoRA:
    torch.manual_seed(SEED)
    return BigramLanguageModelLoRA(
        vocab_size=VOCAB_SIZE,
        n_embd=size.n_embd,
        block_size=CONTEXT,
        device="cpu",
        dropout=0.0,
        n_head=size.n_head,
        n_layer=size.n_layer,
        use_lora=use_lora,
    ).eval()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare_generation(size: str, rounds: int) -> list[results.Row]:
    model = build(SIZES[size], use_lora=False)
    start = torch.zeros(1, 1, dtype=torch.long)
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(rounds + 1):  # the first is the warm-up
        for use_cache in (True, False) if i % 2 else (False, True):
            taken = seconds(
                lambda use=use_cache: model.generate(start, CONTEXT - 1, top_k=50, use_cache=use)
            )
            if i > 0:
                times[use_cache].append(taken)
    ratios = [b / a for a, b in zip(times[True], times[False], strict=True)]
    print(f"Generation of {CONTEXT - 1} tokens, {size} model, float32, medians of {rounds}:")
    for name, use_cache in (("cache", True), ("recompute", False)):
        taken = statistics.median(times[use_cache])
        print(f"   {name:10} {taken:6.3f} s  {(CONTEXT - 1) / taken:6.0f} tokens/s")
    print(f"   recompute / cache: {statistics.median(ratios):.1f}")

    tokens = model.generate(start, CONTEXT - 1)
    with torch.no_grad():
        whole, _ = model(tokens)
        caches = model.new_caches()
        steps = [model(tokens[:, i : i + 1], caches=caches)[0] for i in range(CONTEXT)]
    difference = (torch.cat(steps, 1) - whole).abs().max() / whole.abs().max()
    print(f"   largest difference of a logit, relative to the largest logit: {difference:.1e}")
    speed = (CONTEXT - 1) / statistics.median(times[True])
    row = {"operation": f"generate {CONTEXT - 1} tokens with the cache", "model": size}
    return [row | {"tokens_per_second": speed} | results.ranged("times_as_fast", ratios)]


def time_adapters(size: str, rounds: int) -> list[results.Row]:
    model = build(SIZES[size], use_lora=True)
    bare = take_adapter(model, "base")
    adapters = []
    for _ in range(2):
        for tensor in adapter_state(model).values():
            tensor.normal_(std=0.02)
        adapters.append(take_adapter(model, "base"))
    one, two = adapters
    pair = [(one, 0.7), (two, 0.3)]
    operations: dict[str, Callable[[], object]] = {
        "switch to another adapter": lambda: switch_adapter(model, one),
        "switch to the bare base": lambda: switch_adapter(model, bare),
        "combine two, rank 16": lambda: combine_adapters(pair, bare),
        "combine two, reduced to rank 8": lambda: combine_adapters(pair, bare, rank=8),
        "merge and unmerge": lambda: unmerge_adapter(model, merge_adapter(model)),
    }
    print(f"Adapters of the {size} model, rank 8, float32, medians of {rounds}:")
    found = []
    for name, operation in operations.items():
        operation()
        taken = statistics.median(seconds(operation) for _ in range(rounds))
        print(f"   {name:32} {1000 * taken:7.1f} ms")
        found.append({"operation": name, "model": size, "time_ms": 1000 * taken})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="see that it works")
    results.add_results_options(parser)
    args = parser.parse_args()
    rounds, small, large = (1, "0.8M", "0.8M") if args.quick else (7, "3.3M", "25M")
    print(f"{hardware.device_name(torch.device('cpu'))}, torch {torch.__version__}")
    found = compare_generation(small, rounds) + time_adapters(large, rounds)
    results.write("serving", found, torch.device("cpu"), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
