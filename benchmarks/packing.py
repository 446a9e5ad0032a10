"""Step time on packed records, where none sees another, beside that on plain text.

    python benchmarks/packing.py
    python benchmarks/packing.py --block-size 4096 --batch-size 1

The default model, full and with LoRA, without dropout; steps of all kinds of batch are interleaved
in one process, and a peak of memory is the median of three processes of their own. `masked` are
records whose attention has a mask at any block size, which up to MASK_MAX_CONTEXT of
ops/attention.py all records have.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.measure import at_least_one, interleaved, number_printed_by
from data import load_corpus, load_records
from models import language_model
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from trainer.settings import Config

KINDS = ("text", "records", "masked")


def make_step(
    kind: str, use_lora: bool, dtype: torch.dtype, batch_size: int, block_size: int
) -> Callable[[], None]:
    """A function that takes the next training step on `kind` of data."""
    sizes = {"BATCH_SIZE": str(batch_size), "BLOCK_SIZE": str(block_size)}
    config = Config.from_environment({"USE_LORA": str(use_lora)} | sizes)
    torch.manual_seed(config.seed)
    model = BigramLanguageModelLoRA(
        256, config.n_embd, config.block_size, "cpu", 0.0, config.n_head, config.n_layer,
        use_lora=use_lora,
    )  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    if kind == "text":
        corpus = load_corpus("python-docs", Path())
    else:
        corpus = load_records("python-instructions", config.block_size)

    numbers = itertools.count()

    def step() -> None:
        shape = (config.batch_size, config.block_size)
        batch = corpus.training_batch(*shape, config.seed, next(numbers))
        most = sys.maxsize if kind == "masked" else language_model.MASK_MAX_CONTEXT
        with (
            patch.object(language_model, "MASK_MAX_CONTEXT", most),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            _, loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_mib(kind: str, use_lora: bool, dtype: str, batch_size: int, block_size: int) -> float:
    """Median peak MiB of processes of their own that take three steps each."""
    command = [__file__, "--dtype", dtype, "--memory-of", kind, str(int(use_lora))]
    command += ["--batch-size", str(batch_size), "--block-size", str(block_size)]
    return statistics.median(number_printed_by(command, "memory") for _ in range(3))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=at_least_one, default=12, help="rounds that are timed (default: 12)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=at_least_one, default=32, help="(default: 32)")
    parser.add_argument("--block-size", type=at_least_one, default=128, help="(default: 128)")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    results.add_results_options(parser)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    shape = (args.batch_size, args.block_size)
    hardware.keep_freed_memory()
    if args.memory_of is not None:
        step = make_step(args.memory_of[0], args.memory_of[1] == "1", dtype, *shape)
        for _ in range(3):
            step()
        print(hardware.peak_memory(torch.device("cpu")))
        return
    name = hardware.device_name(torch.device("cpu"))
    print(
        f"default model, {args.batch_size}x{args.block_size}, {args.dtype}, {name}, "
        f"torch {torch.__version__}"
    )
    memory = {
        (kind, use_lora): peak_mib(kind, use_lora, args.dtype, *shape)
        for kind in KINDS
        for use_lora in (False, True)
    }
    found = []
    for use_lora in (False, True):
        steps = {kind: make_step(kind, use_lora, dtype, *shape) for kind in KINDS}
        times = interleaved(steps, args.steps, warmup=2)
        print(f"{'LoRA' if use_lora else 'full'}:")
        for kind in KINDS:
            pairs = zip(times[kind], times["text"], strict=True)
            ratios = [one / text for one, text in pairs]
            milliseconds = statistics.median(times[kind]) * 1000
            print(
                f"   {kind:8} {milliseconds:6.0f} ms, {statistics.median(ratios):.3f} of the step "
                f"time on text; peak {memory[kind, use_lora]:.0f} MiB"
            )
            row = {"batch": f"{args.batch_size}x{args.block_size}", "dtype": args.dtype}
            row |= {"method": "LoRA" if use_lora else "full", "data": kind}
            row |= {"step_ms": milliseconds} | results.ranged("ratio_to_text", ratios)
            found.append(row | {"peak_mib": memory[kind, use_lora]})
    results.write("packing", found, torch.device("cpu"), args)


if __name__ == "__main__":
    main()
