"""What benchmarks share: times of things in turn, memory in a process of its own, options."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import ROOT
from trainer.settings import Config, option_fields


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each step in each round, the rounds of warm-up left out.

    A round runs every step once, in an order that rotates, so that ratios pair steps that ran
    beside each other.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(warmup + rounds):
        first = i % len(names)
        for name in [*names[first:], *names[:first]]:
            started = time.perf_counter()
            steps[name]()
            if i >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def number_printed_by(command: list[str], what: str) -> float:
    """The last word that a Python script prints, such as the peak memory of its own process.

    Exits as `printed_by` does. On Linux the peak of a new process counts the memory that its parent
    had, so ask while this one is small.
    """
    return float(printed_by(command, what).split()[-1])


def printed_by(
    command: list[str],
    what: str,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What a Python script prints, in a folder and an environment that are this process's unless
    given. Exits with the end of the script's stderr when it fails."""
    child = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    if child.returncode != 0:
        sys.exit(
            f"error: measuring {what} ended with exit code {child.returncode}: "
            f"{child.stderr.strip()[-2000:]}"
        )
    return child.stdout


def metrics_of(
    variables: Mapping[str, str],
    folder: Path,
    script: str = "training.py",
    launcher: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Run training.py in a folder with these variables of its own and no others; the lines of its
    metrics.jsonl. `launcher` are Python's options before the script. Exits with the run's exit code
    where it fails, which has said why."""
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / script)],
        cwd=folder,
        env=other_variables() | {"SAMPLE_TOKENS": "0"} | variables,
        stdout=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        sys.exit(done.returncode)
    written = (folder / variables.get("OUT_DIR", "out")).glob("*-metrics.jsonl")
    newest = max(written, key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        sys.exit("error: a run of these variables trains nothing, or has an OUT_DIR of its own")
    return [json.loads(line) for line in newest.read_text().splitlines()]


def names_of(accepted: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: names out of `accepted`, separated by commas, each once."""

    def names(text: str) -> list[str]:
        chosen = list(dict.fromkeys(part.strip() for part in text.split(",")))
        unknown = [name for name in chosen if name not in accepted]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(map(ascii, unknown))}; accepted: {', '.join(accepted)}"
            )
        return chosen

    return names


def variables_of(text: str, more: Sequence[str] = ()) -> dict[str, str]:
    """An argparse type: variables of training.py, or of `more`, as in 'A=1 B=2'."""
    try:
        words = shlex.split(text)
    except ValueError:  # a quotation has no end
        words = [""]
    if not all(re.match(r"\w+=", word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!a} is no set of variables, as in 'A=1 B=2'")
    variables = dict(word.split("=", 1) for word in words)
    for name in variables.keys() - own_variables() - set(more):
        raise argparse.ArgumentTypeError(f"{name} is no variable; training.py --help lists them")
    return variables


def own_variables() -> set[str]:
    """The names of the variables of training.py."""
    return {field.name.upper() for field in option_fields(Config)}


def other_variables() -> dict[str, str]:
    """The environment without the variables of training.py, for runs that set their own."""
    ours = own_variables()
    return {name: value for name, value in os.environ.items() if name not in ours}


def at_least_one(text: str) -> int:
    """An argparse type: an integer from 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!a} is not an integer of at least 1")
    return number


def device_of(text: str) -> torch.device:
    """An argparse type: auto, or a cpu, cuda or mps device that is there."""
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if text == "auto":
        return torch.device(next(kind for kind, count in counts.items() if count))
    kind, colon, index = text.partition(":")
    if kind not in counts or (colon and not index.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"{text!a} is no device; accepted: auto, {', '.join(counts)}, or one such as cuda:1"
        )
    if int(index or 0) >= counts[kind]:
        raise argparse.ArgumentTypeError(f"torch finds no device {text} here")
    return torch.device(text)


def add_memory_option(parser: argparse.ArgumentParser) -> None:
    """--memory and --no-memory."""
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory too, each in a process of its own",
    )
