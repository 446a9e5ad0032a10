"""Compare runs of training.py: a table of what they cost and reached, and their curves.

    python compare.py output_full.txt output_lora.txt
    python compare.py out                                   the metrics.jsonl files of a folder
    python compare.py out other/output.txt --plot curves.png

Each file is the log of a run: its redirected output (`python training.py > output_full.txt`) or its
metrics.jsonl. Ratios are to the first run. A warning names each difference between the runs that
makes their comparison unfair. An unfinished run is shown as far as it is.
"""

import argparse
import io
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from files import FileError
from files.streams import exit_on_signals, run_command, write_out
from files.writing import replacing
from trainer.log import wrote_line
from trainer.log_reader import LogError, RunLog, join, printable, read_logs

FORMATS = (".png", ".pdf", ".svg")
# Okabe and Ito's colours, which colour-blind readers tell apart; markers for print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv"
# Runs that differ in one of these are no fair comparison.
VARIABLES = (
    "MAX_STEPS", "BATCH_SIZE", "GRAD_ACCUM_STEPS", "BLOCK_SIZE", "DROPOUT", "LOSS_ON_PROMPT",
    "COMPILE", "GRAD_CHECKPOINT", "PATIENCE",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, its format, and its value for a run.

    What `grows` changes with every step, and has no ratio before both runs have ended.
    """

    name: str
    unit: str
    width: int
    form: str
    value: Callable[[RunLog], float | None]
    grows: bool = False


COLUMNS = [
    Column("parameters", "", 11, ",d", lambda run: run.total),
    Column("trainable", "", 11, ",d", lambda run: run.trainable),
    Column("share", "%", 6, ".2f", lambda run: run.share),
    Column("time", "s", 7, ".1f", lambda run: run.elapsed, grows=True),
    Column(
        "step", "ms", 7, ".1f", lambda run: run.median_step_time and run.median_step_time * 1000
    ),
    Column("speed", "tokens/s", 8, ".0f", lambda run: run.tokens_per_second),
    Column("memory", "MiB", 6, ".0f", lambda run: run.peak_memory),
    Column("best", "val loss", 8, ".4f", lambda run: run.best_loss, grows=True),
    Column("final", "val loss", 8, ".4f", lambda run: run.last_loss, grows=True),
    Column("file", "MiB", 7, ".2f", lambda run: run.file_size),
]


class Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, and prints the help as the script prints all else."""

    def error(self, message: str) -> NoReturn:
        raise LogError(f"{message}; python compare.py --help shows what is accepted")

    def print_help(self, file: object = None) -> None:
        say(*self.format_help().splitlines())


def main(arguments: list[str]) -> int:
    """Run the script; returns its exit code: 0, 2 for input that cannot be used, 130 for Ctrl-C."""
    return run_command(lambda: work(parse(arguments)), LogError, FileError)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line. Raises LogError for a bad one, SystemExit after --help."""
    usage, _, details = __doc__.partition("\n\n")
    parser = Parser(
        prog="compare.py",
        description=usage,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", nargs="+", help="redirected output, metrics.jsonl, or a folder of *metrics.jsonl"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw the validation losses, as png, pdf or svg (needs matplotlib)",
    )
    return parser.parse_args(arguments)


def work(options: argparse.Namespace) -> None:
    """Print the table, the notes and the warnings, and draw the plot if it is asked for."""
    if options.plot is not None and options.plot.suffix.lower() not in FORMATS:
        raise LogError(f"--plot {options.plot}: the name must end in {', '.join(FORMATS)}")
    runs, notes = join(log for path in options.run for log in read_logs(path))
    say(*table(runs))
    say(*(f"Note: {note}" for note in notes), *(f"Warning: {w}" for w in warnings(runs)))
    if options.plot is not None:
        say(wrote_line(options.plot, plot(runs, options.plot)))


def table(runs: list[RunLog]) -> list[str]:
    """Lines of a table: for each run its name, its values, and their ratios to the first run's."""
    lines = [row(c.name for c in COLUMNS), row(c.unit for c in COLUMNS)]
    for run in runs:
        words = [run.mode, run.data and f"data {run.data}", run.progress]
        lines.append(f"{run.name}: {', '.join(word for word in words if word)}")
        values = ((c.value(run), c.form) for c in COLUMNS)
        lines.append(row("-" if value is None else format(value, form) for value, form in values))
        if run is not runs[0]:
            lines.append(row(ratio(run, runs[0], column) for column in COLUMNS))
    return [line for line in lines if line]


def row(cells: Iterable[str]) -> str:
    """A line of the table: one cell for each column, aligned to the right."""
    return "  ".join(f"{cell:>{c.width}}" for cell, c in zip(cells, COLUMNS, strict=True)).rstrip()


def ratio(run: RunLog, first: RunLog, column: Column) -> str:
    """A run's value over the first run's, as in `0.95x`; empty where there is none."""
    value, reference = column.value(run), column.value(first)
    if value is None or not reference or not math.isfinite(value / reference):
        return ""
    if column.grows and not (run.is_finished and first.is_finished):
        return ""
    return f"{value / reference:.2f}x"


def warnings(runs: list[RunLog]) -> list[str]:
    """A line for each difference that makes the comparison unfair, and for each unfinished run."""
    found = [f"{run.name} is {run.progress}" for run in runs if not run.is_finished]
    for name in conditions(runs[0]):
        groups: dict[str, list[RunLog]] = {}
        for run in runs:
            key, _ = conditions(run)[name]
            if key is not None:
                groups.setdefault(key, []).append(run)
        if len(groups) < 2:
            continue
        sides = [(conditions(g[0])[name][1], ", ".join(r.name for r in g)) for g in groups.values()]
        line = f"{name} differs: {'; '.join(f'{value} in {names}' for value, names in sides)}"
        if name == "base" and len({run.base_path is None for run in runs if run.base}) == 2:
            line += "; a run from random weights has more to learn than one from a trained base"
        found.append(line)
    return found


def conditions(run: RunLog) -> dict[str, tuple[str | None, str | None]]:
    """What must agree for a fair comparison: by name, what is compared and how it is written."""
    base = f"{run.base_path or 'random weights'} (fingerprint {run.base})"
    kind, _, hardware = (run.device or "").partition(" (")
    values = {name: run.config.get(name) for name in VARIABLES}
    sizes = [run.config.get(name, "") for name in ("EVAL_BATCHES", "BATCH_SIZE")]
    known = all(re.fullmatch(r"\d{1,18}", size) for size in sizes)
    count = str(math.prod(map(int, sizes))) if known else None
    values["number of validation windows"] = count
    values["number of processes"] = str(run.processes)
    values |= {"dtype": run.dtype, "device": kind or None, "hardware": hardware[:-1] or None}
    found = {"data": (run.checksum, f"{run.data} ({run.checksum})"), "base": (run.base, base)}
    return found | {name: (value, value) for name, value in values.items()}


def plot(runs: list[RunLog], path: Path) -> int:
    """Draw the validation losses against steps and seconds; returns the file's size in bytes.

    Raises LogError, and writes nothing, without matplotlib or without an evaluation, and FileError
    when the file cannot be written.
    """
    runs = [run for run in runs if run.evaluations]
    if not runs:
        raise LogError(f"--plot {path}: there is no evaluation to draw yet")
    names = [label(run) for run in runs]
    columns = 2 if len(runs) > 2 and max(map(len, names)) < 50 else 1
    height = 3.5 + 0.22 * math.ceil(len(runs) / columns)
    figure = new_figure(9, height)
    panels = figure.subplots(1, 2, sharey=True)
    bottom, top, beyond = limits(runs)
    axes = (("step", "optimizer steps"), ("elapsed", "training time (s)"))
    for panel, (key, words) in zip(panels, axes, strict=True):
        right = 1.0
        for i, run in enumerate(runs):
            x = [getattr(e, key) for e in run.evaluations]
            loss = [e.val_loss for e in run.evaluations]
            low = [e.val_loss - e.val_error for e in run.evaluations]
            high = [e.val_loss + e.val_error for e in run.evaluations]
            panel.plot(x, loss, markersize=4, markevery=math.ceil(len(x) / 15), **look(i))
            panel.fill_between(x, low, high, color=look(i)["color"], alpha=0.25, linewidth=0)
            right = max([right, *(position for position in x if math.isfinite(position))])
        panel.set(xlabel=words, xlim=(-0.02 * right, 1.02 * right), ylim=(bottom, top))
        dress(panel)
        style = {"ha": "right", "va": "top", "fontsize": "small", "color": "0.4"}
        panel.text(0.98, 0.98, beyond, transform=panel.transAxes, **style)
    panels[0].set_ylabel("validation loss (nats per token)\nband: standard error")
    figure.suptitle(heading(runs), fontsize="medium")
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(panels[0].lines, names, **place)
    content = picture(figure, path.suffix[1:].lower())
    with replacing(path) as file:
        file.write(content)
    return len(content)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, in the look of this project's plots: white under all of
    it, so that it reads on a dark page too. Raises LogError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # which needs no display
    except ImportError as error:
        raise LogError("--plot needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def look(i: int) -> dict[str, str]:
    """The colour and the marker of the line number `i`."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def dress(panel: Any) -> None:
    """The look of a panel: a light grid, and no frame."""
    panel.grid(color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def picture(figure: Any, form: str) -> bytes:
    """The figure as a png, pdf or svg; the same figure gives the same bytes."""
    from matplotlib import rc_context

    content = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "lora"}):
        figure.savefig(content, format=form, dpi=200, metadata=dates.get(form))
    return content.getvalue()


def label(run: RunLog) -> str:
    """What a legend says of a run; a dollar sign would begin a formula."""
    unfinished = "" if run.is_finished else ", unfinished"
    words = f"{run.mode or 'run'} on {run.data or '?'}{unfinished}: {run.name}"
    return printable(words).replace("$", r"\$")


def heading(runs: list[RunLog]) -> str:
    """The data and the models of a plot in words."""
    names = ("N_LAYER", "N_EMBD", "BLOCK_SIZE")
    shapes = dict.fromkeys(tuple(run.config.get(name, "?") for name in names) for run in runs)
    models = (f"{n} layers of width {width}, context {length}" for n, width, length in shapes)
    data = dict.fromkeys(run.data for run in runs if run.data)
    return f"data: {' and '.join(data)}; model: {' and '.join(models)}".replace("$", r"\$")


def limits(runs: list[RunLog]) -> tuple[float, float, str]:
    """Limits of the axis of losses, and words for what lies above them.

    The first losses are so high that they would press what matters into a flat line. The axis has
    the last loss of every run, and all after a tenth of the longest run.
    """
    every = [e for run in runs for e in run.evaluations if math.isfinite(e.val_loss)]
    if not every:
        return 0.0, 1.0, ""
    late = max(e.step for e in every) / 10
    ends = [run.evaluations[-1] for run in runs]
    high = max(e.val_loss for e in every if e.step >= late or e in ends)
    low, highest = min(e.val_loss for e in every), max(e.val_loss for e in every)
    errors = [e.val_error for e in every if e.val_loss <= high and math.isfinite(e.val_error)]
    margin = max([0.08 * (high - low), *errors, 1e-3])
    if highest <= high + margin:
        return low - margin, highest + margin, ""
    return low - margin, high + margin, f"higher values, up to {highest:.2f}, not shown"


def say(*lines: str) -> None:
    """Print whole lines to stdout at once. Raises FileError when that cannot be written."""
    for line in lines:
        write_out(printable(line) + "\n")


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
