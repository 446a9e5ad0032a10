"""The three runs of the README, to the end: loss against seconds, and what each run reached.

    python benchmarks/curves.py
    python benchmarks/curves.py --common DEVICE=cpu
    python benchmarks/curves.py --runs base

A base is trained on python-code, and fine-tuned on python-docs with LoRA and with all its weights.
Each run is training.py as a user starts it, in a process of its own, one after the other in one
folder. `curves` gets a row for each evaluation, `runs` one for each run.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.measure import metrics_of, names_of, variables_of
from trainer.settings import Config

RUNS = {
    "base": "python training.py",
    "LoRA": "DATA=python-docs USE_LORA=True python training.py",
    "full": "BASE_CHECKPOINT=out/full.pt DATA=python-docs OUT_DIR=out-tuned python training.py",
}
# What `python training.py` was before it had Muon, beside the runs of the README.
OLD = {
    "old": "OPTIMIZER=adamw SCHEDULE=cosine LEARNING_RATE=0.003 DROPOUT=0.2 MAX_STEPS=1000 "
    "OUT_DIR=out-old python training.py"
}


def lines_of(run: str, folder: Path, common: dict[str, str]) -> list[dict[str, Any]]:
    """Start a run in `folder`; the lines of its metrics.jsonl. Exits where the run fails."""
    own = variables_of((RUNS | OLD)[run].removesuffix("python training.py"))
    return metrics_of(common | own, folder)


def rows_of(
    run: str, lines: list[dict[str, Any]], common: dict[str, str]
) -> tuple[list[results.Row], results.Row]:
    """A row for each evaluation, and one for the run."""
    first, *evaluations, last = lines
    text = {"run": run, "data": first["run"]["data"], "dtype": first["run"]["dtype"]}
    if common:
        text["variables"] = " ".join(f"{name}={value}" for name, value in common.items())
    curve = [
        text | {"step": line["step"], "time_s": line["elapsed"], "loss": line["val_loss"]}
        for line in evaluations
    ]
    summary = last["summary"]
    start = {"loss_before": curve[0]["loss"]} if curve[0]["step"] == 0 else {}
    outcome = text | start | {"best_loss": summary["best_val_loss"]}
    outcome |= {"final_loss": summary["final_val_loss"], "steps": curve[-1]["step"]}
    outcome |= {"time_s": summary["training_time"], "peak_mib": summary["peak_memory"]}
    outcome |= {"step_ms": 1000 * summary["median_step_time"]}
    outcome |= {"trained": first["run"]["parameters"]["trainable"]}
    return curve, outcome


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=names_of([*RUNS, *OLD]), default=list(RUNS), metavar="NAMES",
        help="of base, LoRA and full, which need the base, and old, the former recipe of the base "
        "(default: those three)",
    )  # fmt: skip
    parser.add_argument(
        "--common", type=variables_of, default={}, help="variables of all runs, as in 'A=1 B=2'"
    )
    results.add_results_options(parser)
    args = parser.parse_args()
    try:
        config = Config.from_environment(args.common)
        device, _ = hardware.choose_device(config.device)
    except ValueError as error:
        parser.error(f"--common: {error}")
    hardware.choose_threads(config.num_threads, 1)
    curves: list[results.Row] = []
    outcomes: list[results.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for run in args.runs:
            curve, outcome = rows_of(run, lines_of(run, Path(folder), args.common), args.common)
            curves += curve
            outcomes.append(outcome)
            results.write("curves", curves, device, args)
            results.write("runs", outcomes, device, args)
    print(results.table(outcomes))


if __name__ == "__main__":
    main()
