"""What variables of training.py cost and change: runs with each set of them, in turn.

    python benchmarks/variables.py "" GRAD_CHECKPOINT=True COMPILE=True
    python benchmarks/variables.py --common "USE_LORA=True" "" "PROCESSES=2" "PROCESSES=2 FSDP=True"
    python benchmarks/variables.py --rounds 4 --steps 1000 DTYPE=float32 DTYPE=bfloat16
    python benchmarks/variables.py --emulate-bfloat16 --rounds 4 DTYPE=float32 DTYPE=bfloat16

Each argument is a set of variables, "" for none, and PROCESSES=n stands for torchrun with n. The
first set is what the others are compared with. Each run is training.py as a user starts it, in a
process and an output folder of its own; a round runs every set once, and ratios are medians of
those within a round. Each round has a SEED of its own, counted up from the first; losses are means,
with the mean difference from the first set's and its range. Memory, the first process's, is that of
the last run.

Bytes are those that all processes together sent over the loopback in a step: the difference between
this run and one of a single step. Nothing else may use it meanwhile.

--emulate-bfloat16 is for a CPU without it, to see the losses (emulated_bfloat16.py).
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.measure import at_least_one, metrics_of, variables_of
from trainer.settings import Config

# What is given by options, or would write elsewhere.
NOT_IN_SETS = ("MAX_STEPS", "SAMPLE_TOKENS", "OUT_DIR", "TEST_MODE")


def summary_of(script: str, variables: dict[str, str], steps: int) -> dict[str, Any]:
    """The summary that a run of so many steps leaves, and the bytes that it sent."""
    processes = int(variables.get("PROCESSES", 1))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    own = {name: value for name, value in variables.items() if name != "PROCESSES"}
    with tempfile.TemporaryDirectory() as folder:
        own |= {"MAX_STEPS": str(steps), "OUT_DIR": folder}
        before = bytes_sent()
        first, *_, last = metrics_of(own, Path.cwd(), script, launcher if processes > 1 else ())
    facts = {name: first["run"][name] for name in ("device", "dtype")}
    return last["summary"] | facts | {"sent": bytes_sent() - before}


def of_round(variables: dict[str, str], number: int) -> dict[str, str]:
    """The variables of a set in a round, with its seed; one that is no number the run refuses."""
    seed = variables.get("SEED", str(Config.seed))
    return variables | {"SEED": str(int(seed) + number) if seed.isdecimal() else seed}


def compared(losses: Sequence[tuple[float, float]]) -> str:
    """The losses of a set's rounds, each beside the first set's, in words."""
    mean = statistics.mean(loss for loss, _ in losses)
    differences = [loss - first for loss, first in losses]
    return (
        f"{mean:.4f}, {statistics.mean(differences):+.4f} from the first's "
        f"({min(differences):+.4f} to {max(differences):+.4f})"
    )


def bytes_sent() -> int:
    """Bytes that this machine has sent to itself; 0 where the system does not tell."""
    table = Path("/proc/net/dev")
    lines = table.read_text().splitlines() if table.exists() else []
    return sum(int(line.split()[9]) for line in lines if line.split()[0] == "lo:")


def parse(text: str) -> dict[str, str]:
    """The variables of a set. Raises ArgumentTypeError for what is none."""
    variables = variables_of(text, more=["PROCESSES"])
    for name in variables.keys() & set(NOT_IN_SETS):
        raise argparse.ArgumentTypeError(f"{name} is not for a set; --steps is the steps of a run")
    try:
        at_least_one(variables.get("PROCESSES", "1"))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"PROCESSES={error}") from error
    return variables


def main() -> None:
    """Run, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", type=parse, help="sets of variables to compare")
    parser.add_argument("--common", type=parse, default={}, help="variables of all sets")
    parser.add_argument(
        "--rounds", type=at_least_one, default=3, help="runs of each set (default: 3)"
    )
    parser.add_argument(
        "--steps", type=at_least_one, default=12, help="steps of a run (default: 12)"
    )
    parser.add_argument(
        "--emulate-bfloat16", action="store_true", help="make its products by way of float32"
    )
    results.add_results_options(parser)
    args = parser.parse_args()
    script = "benchmarks/emulated_bfloat16.py" if args.emulate_bfloat16 else "training.py"
    sets = [args.common | variables for variables in args.sets]
    common = " ".join(f"{n}={v}" for n, v in args.common.items()) or "the defaults"
    print(f"{args.rounds} runs of {args.steps} steps each, {common}; torch {torch.__version__}")
    if args.emulate_bfloat16:
        print("products of bfloat16 are made in float32 and rounded: its times tell nothing")
    rounds = [
        [summary_of(script, of_round(variables, i), args.steps) for variables in sets]
        for i in range(args.rounds)
    ]
    found = []
    for i, variables in enumerate(args.sets):
        times = [r[i]["median_step_time"] for r in rounds]
        ratios = [r[i]["median_step_time"] / r[0]["median_step_time"] for r in rounds]
        losses = [(r[i]["final_val_loss"], r[0]["final_val_loss"]) for r in rounds]
        last = rounds[-1][i]
        words = " ".join(f"{n}={v}" for n, v in variables.items()) or "(none)"
        emulated = " (emulated)" if args.emulate_bfloat16 else ""
        row = {"runs": f"{args.steps} steps, {common}", "variables": words}
        row |= {"dtype": last["dtype"] + emulated}
        row["step_ms"] = statistics.median(times) * 1000
        row |= results.ranged("step_ratio", ratios) | {"peak_mib": last["peak_memory"]}
        row["loss"] = statistics.mean(loss for loss, _ in losses)
        differences = [loss - first for loss, first in losses]
        row |= results.ranged("loss_minus_first", differences)
        row["loss_minus_first"] = statistics.mean(differences)
        found.append(row)
        line = (
            f"{words}: "
            f"step {statistics.median(times) * 1000:.1f} ms, {statistics.median(ratios):.2f} of "
            f"the first ({min(ratios):.2f} to {max(ratios):.2f}), peak {last['peak_memory']:.0f} "
            f"MiB, validation loss {compared(losses)}, {last['device']}"
        )
        if "compile_time" in last:
            first = rounds[0][i]["compile_time"]
            line += f", compiled in {first:.1f} s at first and {last['compile_time']:.1f} s at last"
        if "PROCESSES" in sets[i] and args.steps > 1:
            sent = (last["sent"] - summary_of(script, sets[i], 1)["sent"]) / (args.steps - 1)
            line += f", {sent / 1e6:.2f} MB sent a step"
            row["sent_mb"] = sent / 1e6
        print(line, flush=True)
    device, _ = hardware.choose_device(sets[0].get("DEVICE", "auto"))
    results.write("variables", found, device, args)


if __name__ == "__main__":
    main()
