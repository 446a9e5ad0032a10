"""Where the time of a training step goes: torch's profiler over full, floor and LoRA.

    python benchmarks/profile_step.py [size] [dtype]        default: 3.3M bfloat16

Prints for each method the operations that take most of a step, in ms a step with their calls. The
profiler slows every operation a little, small ones most: read it for the order, and
step_time.py for the times.
"""

import argparse
import sys

import torch
from step_time import DTYPES, SIZES, Settings, build_model, hardware, training_step
from torch.profiler import ProfilerActivity, profile

STEPS = 10
ROWS = 14


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", nargs="?", choices=SIZES, default="3.3M")
    parser.add_argument("dtype", nargs="?", choices=DTYPES, default="bfloat16")
    args = parser.parse_args()
    size_name, dtype_name = args.size, args.dtype
    hardware.keep_freed_memory()
    device = torch.device("cpu")
    print(f"{size_name}, {dtype_name}, {hardware.device_name(device)}, torch {torch.__version__}")
    settings = Settings(rank=8, dropout=0.0, lora_dropout=0.0, steps=STEPS, device=device)
    for method in ("full", "floor", "lora"):
        model = build_model(method, SIZES[size_name], DTYPES[dtype_name], settings)
        step = training_step(model, SIZES[size_name], DTYPES[dtype_name], device)
        for _ in range(3):
            step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(STEPS):
                step()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events) / STEPS / 1000
        print(f"\n{method}: {total:.1f} ms a step under the profiler")
        for event in events[:ROWS]:
            ms, calls = event.self_cpu_time_total / STEPS / 1000, event.count / STEPS
            print(f"   {event.key[:48]:48} {ms:8.2f} ms  {calls:5.0f} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
