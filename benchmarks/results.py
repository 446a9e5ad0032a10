"""What benchmarks found, as files: one JSON file a run of a script, in benchmarks/results/.

A row is a dict. Its texts say what was measured and its numbers what was found, so that a later
file's rows can take the place of an earlier file's. A number may have its range beside it, as in
`ratio`, `ratio_low`, `ratio_high`, or its standard deviation, as in `loss_sd`. report.py makes
RESULTS.md and the plots of these files.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from files.writing import replacing
from hardware.device import cpu_capabilities

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
PACKAGES = ("transformers", "peft", "trl", "loralib", "bitsandbytes")
Row = dict[str, Any]

# When the script started, and which part of the cores was busy in the minute before.
STARTED = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
CORES = os.cpu_count() or 1
LOAD = round(os.getloadavg()[0] / CORES, 2) if hasattr(os, "getloadavg") else None


def add_results_options(parser: argparse.ArgumentParser) -> None:
    """--results and --commit, as `write` takes them."""
    parser.add_argument(
        "--results", type=_folder, default=FOLDER, metavar="FOLDER",
        help="where the file of results is written (default: benchmarks/results)",
    )  # fmt: skip
    parser.add_argument("--commit", help="that of this code (default: what git says)")


def _folder(text: str) -> Path:
    """An argparse type: a folder to write to, which is made before anything is measured."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        words = f"{text!a} cannot be a folder of results: {error.strerror}"
        raise argparse.ArgumentTypeError(words) from error
    return Path(text)


def write(name: str, rows: Iterable[Row], device: torch.device, args: argparse.Namespace) -> Path:
    """Write the rows of the benchmark `name`, measured on `device`; returns the file's path.

    A later call of the same process writes the same file again, so that a long run can leave what
    it has. `args` holds `add_results_options`. Raises FileError when the file cannot be written.
    """
    machine = machine_name(device)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{name}_{slug(machine)}_{STARTED:%Y-%m-%dT%H-%M-%S}.json"
    facts = {
        "benchmark": name,
        "command": command_line(sys.argv),
        "commit": args.commit or commit(),
        "date": STARTED.isoformat(),
        "machine": machine,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "load_before": LOAD,
        "versions": versions(),
    }
    with replacing(path) as file:
        file.write(as_text(facts, rows).encode())
    return path


def ranged(name: str, values: Sequence[float]) -> Row:
    """The median of the values as `name`, and the lowest and highest of them beside it."""
    figures = {name: statistics.median(values)}
    return figures | {f"{name}_low": min(values), f"{name}_high": max(values)}


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown: a column for each name, a range behind its figure."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if not name.endswith(("_low", "_high", "_sd"))]
    lines = [[heading(name) for name in names], ["---"] * len(names)]
    lines += [[cell(row, name) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heading(name: str) -> str:
    """The name of a column in words, as in `step, ms`."""
    words, _, unit = name.replace("_", " ").rpartition(" ")
    units = {"ms": "ms", "s": "s", "mib": "MiB", "mb": "MB", "percent": "%"}
    return f"{words}, {units[unit]}" if words and unit in units else f"{words} {unit}".strip()


def cell(row: Row, name: str) -> str:
    """The figure or text `name` of a row, with its range; empty where it has none."""
    if row.get(name) is None:
        return ""
    words = figure(name, row[name])
    if f"{name}_low" in row:
        low, high = (figure(name, row[f"{name}_{end}"]) for end in ("low", "high"))
        words += f" ({low} to {high})" if low != high else ""
    if f"{name}_sd" in row:
        words += f" +- {figure(name, row[f'{name}_sd'])}"
    return words


def figure(name: str, value: str | float) -> str:
    """A value in words: losses with four decimals, other figures with about three digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if "loss" in name:
        return f"{value:.4f}"
    if name == "learning_rate":
        return f"{value:g}"
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def as_text(facts: dict[str, Any], rows: Iterable[Row]) -> str:
    """The content of a file: a fact a line, and a row a line with figures of six digits."""
    head = json.dumps(facts, indent=1).removesuffix("\n}")
    lines = [
        json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
        for row in rows
    ]
    return head + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The files of a folder, the newest last."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: result["date"])


def machine_name(device: torch.device) -> str:
    """The GPU; or the CPU with its cores and the instructions that its speed depends on."""
    if device.type != "cpu":
        return hardware.device_name(device)
    capabilities = cpu_capabilities()
    sets = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512_f": "AVX-512", "avx2": "AVX2"}
    has = next((words for flag, words in sets.items() if capabilities.get(flag, False)), None)
    name = capabilities.get("cpu_name") or platform.machine()
    return f"{name}{f' with {has}' if has else ''}, {CORES} cores"


def versions() -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line(arguments: Sequence[str]) -> str:
    """The command without options that say where files go or what the commit is."""
    script, *words = arguments
    left_out, kept = ("--results", "--commit", "--output"), []
    for word in words:
        if kept and kept[-1] in left_out:
            kept.pop()
        elif word.partition("=")[0] not in left_out or "=" not in word:
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *kept])


def commit() -> str | None:
    """The commit of this code, with `-dirty` where files differ from it; None without git."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def slug(text: str) -> str:
    """The words of a text for a file's name."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))
