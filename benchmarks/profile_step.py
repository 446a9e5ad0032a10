"""Where the time of a training step goes: torch's profiler over full, floor and LoRA on a CPU.

    python benchmarks/profile_step.py
    python benchmarks/profile_step.py --models nano,SmolLM2-135M --dtypes float32

A model is a size of step_time.py or a published shape of families.py, with 512 tokens a step.
Prints for each method the operations that take most of a step, in ms a step with their calls. The
profiler slows every operation a little, small ones most: read it for the order, and step_time.py
and families.py for the times.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import families, results
from benchmarks.measure import at_least_one, names_of
from benchmarks.step_time import DTYPES, SIZES, Settings, build_model, training_step

METHODS = ("full", "floor", "lora")
ROWS = 12
TOKENS = 512  # of a step of a published shape
CPU = torch.device("cpu")


def steps_of(model: str, dtype: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each method with its training step."""
    if model in SIZES:
        settings = Settings(rank=8, dropout=0.0, lora_dropout=0.0, steps=1, device=CPU)
        for method in METHODS:
            built = build_model(method, SIZES[model], DTYPES[dtype], settings)
            yield method, training_step(built, SIZES[model], DTYPES[dtype], CPU)
        return
    tokens = min(TOKENS, families.family_of(model)[1].block_size)
    setting = families.Setting(model, dtype, 1, tokens, "cpu", False, False, None, "wall", 1)
    with tempfile.TemporaryDirectory() as name:
        families.write_folder(Path(name), model)
        for method in METHODS:
            own = method.replace("lora", "ours")
            yield method, families.our_step(Path(name), setting, own, "auto")


def rows_of(model: str, dtype: str, steps: int) -> Iterator[results.Row]:
    """The operations that take most of a step, for each method."""
    for method, step in steps_of(model, dtype):
        for _ in range(2):
            step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                step()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        for event in events[:ROWS]:
            row = {"model": model, "dtype": dtype, "method": method, "operation": event.key[:48]}
            row |= {"time_ms": event.self_cpu_time_total / steps / 1000}
            row |= {"share_percent": 100 * event.self_cpu_time_total / total}
            yield row | {"calls": event.count // steps}
        del step  # and the model, before the next one is made


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [*SIZES, *families.MODELS]
    parser.add_argument("--models", type=names_of(models), default=["3.3M"], metavar="NAMES")
    parser.add_argument("--dtypes", type=names_of(list(DTYPES)), default=["bfloat16"])
    parser.add_argument("--steps", type=at_least_one, default=5, help="(default: 5)")
    results.add_results_options(parser)
    args = parser.parse_args()
    hardware.keep_freed_memory()
    found: list[results.Row] = []
    for model in args.models:
        for dtype in args.dtypes:
            rows = list(rows_of(model, dtype, args.steps))
            found += rows
            print(results.table(rows), flush=True)
            results.write("profile", found, CPU, args)


if __name__ == "__main__":
    main()
