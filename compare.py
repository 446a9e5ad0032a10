"""Compare runs of training.py: a table of what they cost and reached, and their curves.

    python compare.py output_full.txt output_lora.txt
    python compare.py out                                   the metrics.jsonl files of a folder
    python compare.py out other/output.txt --plot curves.png

Each file is the redirected output of a run (`python training.py > output_full.txt`) or its
metrics.jsonl. Ratios are to the first run. A warning names each difference between the runs that
makes their comparison unfair. Runs may be unfinished: they are shown as far as they are.
"""

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from records import Record, RecordError, join, printable, read_records

FORMATS = (".png", ".pdf", ".svg")
# Okabe and Ito's colours, which colour-blind readers tell apart; markers for print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv"


@dataclass(frozen=True)
class Column:
    """A column of the table. What changes with every step has no ratio before a run has ended."""

    name: str
    unit: str
    width: int
    form: str
    value: Callable[[Record], float | None]
    grows: bool = False


COLUMNS = [
    Column("parameters", "", 11, ",d", lambda run: run.total),
    Column("trainable", "", 11, ",d", lambda run: run.trainable),
    Column("share", "%", 6, ".2f", lambda run: run.share),
    Column("time", "s", 7, ".1f", lambda run: run.elapsed, grows=True),
    Column("step", "ms", 7, ".1f", lambda run: run.step_time and run.step_time * 1000),
    Column("speed", "tokens/s", 8, ".0f", lambda run: run.tokens_per_second),
    Column("memory", "MiB", 6, ".0f", lambda run: run.peak_memory),
    Column("best", "val loss", 8, ".4f", lambda run: run.best_loss, grows=True),
    Column("final", "val loss", 8, ".4f", lambda run: run.last_loss, grows=True),
    Column("file", "MiB", 7, ".2f", lambda run: run.file_size),
]

# What must agree for a fair comparison: its name, what is compared, and how it is called.
Words = Callable[[Record], str | None]
CONDITIONS: list[tuple[str, Words, Words]] = [
    ("data", lambda run: run.checksum, lambda run: f"{run.data} ({run.checksum})"),
    (
        "base",
        lambda run: run.base,
        lambda run: f"{run.base_path or 'random weights'} (fingerprint {run.base})",
    ),
    *(
        (name, lambda run, name=name: run.config.get(name), lambda run, name=name: run.config[name])
        for name in ("MAX_STEPS", "BATCH_SIZE", "GRAD_ACCUM_STEPS", "BLOCK_SIZE")
    ),
    ("dtype", lambda run: run.dtype, lambda run: run.dtype),
    ("device", lambda run: run.device, lambda run: run.device),
    ("evaluation windows", lambda run: windows(run), lambda run: windows(run)),
]


def main(arguments: list[str]) -> int:
    """Run the script; returns its exit code: 0, or 2 for input that cannot be used."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        work(parse(arguments))
    except RecordError as error:
        return fail(str(error))
    except OSError as error:  # the reader of stdout has gone, or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return fail(f"stdout: {error.strerror}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    usage, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
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
        help="draw validation loss against steps and seconds, as png, pdf or svg (needs matplotlib)",
    )
    return parser.parse_args(arguments)


def work(options: argparse.Namespace) -> None:
    if options.plot is not None and options.plot.suffix.lower() not in FORMATS:
        raise RecordError(f"--plot {options.plot}: the name must end in {', '.join(FORMATS)}")
    records, notes = join(r for path in options.run for r in read_records(path))
    say(*table(records), "")
    say(*(f"Note: {note}" for note in notes), *(f"Warning: {w}" for w in warnings(records)))
    if options.plot is not None:
        size = plot(records, options.plot)
        say(f"Wrote {options.plot}: {size / 2**20:.2f} MiB")


def table(records: list[Record]) -> list[str]:
    """Lines of a table: for each run its name, its values, and their ratios to the first run's."""
    lines = [row(c.name for c in COLUMNS), row(c.unit for c in COLUMNS)]
    for run in records:
        words = [run.mode, run.data and f"data {run.data}", run.progress]
        lines.append(f"{run.name}: {', '.join(word for word in words if word)}")
        values = ((c.value(run), c.form) for c in COLUMNS)
        lines.append(row("-" if value is None else format(value, form) for value, form in values))
        if run is not records[0]:
            lines.append(row(ratio(run, records[0], column) for column in COLUMNS))
    return lines


def row(cells: Iterable[str]) -> str:
    return "  ".join(f"{cell:>{c.width}}" for cell, c in zip(cells, COLUMNS, strict=True)).rstrip()


def ratio(run: Record, first: Record, column: Column) -> str:
    value, reference = column.value(run), column.value(first)
    if value is None or not reference or not math.isfinite(value / reference):
        return ""
    if column.grows and not (run.is_finished and first.is_finished):
        return ""
    return f"{value / reference:.2f}x"


def windows(run: Record) -> str | None:
    """How many windows of validation data an evaluation of the run reads."""
    sizes = [run.config.get(name, "") for name in ("EVAL_BATCHES", "BATCH_SIZE")]
    return str(math.prod(map(int, sizes))) if all(size.isdecimal() for size in sizes) else None


def warnings(records: list[Record]) -> list[str]:
    """A line for each difference that makes the comparison unfair, and for each unfinished run."""
    found = [f"{run.name} is {run.progress}" for run in records if not run.is_finished]
    for name, key, words in CONDITIONS:
        groups: dict[str, list[Record]] = {}
        for run in records:
            if key(run) is not None:
                groups.setdefault(key(run), []).append(run)
        if len(groups) < 2:
            continue
        parts = (f"{words(g[0])} in {', '.join(r.name for r in g)}" for g in groups.values())
        line = f"{name} differs: {'; '.join(parts)}"
        if name == "base" and len({g[0].base_path is None for g in groups.values()}) == 2:
            line += "; a run from random weights has more to learn than one from a trained base"
        found.append(line)
    return found


def plot(records: list[Record], path: Path) -> int:
    """Draw the validation losses against steps and seconds; returns the file's size in bytes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecordError("--plot needs matplotlib: pip install matplotlib") from error
    drawn = [run for run in records if run.evaluations]
    if not drawn:
        raise RecordError(f"--plot {path}: there is no evaluation to draw yet")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for i, run in enumerate(drawn):
        loss = [e.val_loss for e in run.evaluations]
        low = [e.val_loss - e.val_error for e in run.evaluations]
        high = [e.val_loss + e.val_error for e in run.evaluations]
        colour = COLOURS[i % len(COLOURS)]
        style = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        style |= {"linewidth": 1.5, "markevery": max(1, len(loss) // 12)}
        for panel, key in zip(panels, ("step", "elapsed"), strict=True):
            x = [getattr(e, key) for e in run.evaluations]
            panel.plot(x, loss, label=legend(run), **style)
            panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    bottom, top, beyond = limits(drawn)
    for panel, label in zip(panels, ("optimizer steps", "training time (s)"), strict=True):
        panel.set(xlabel=label, ylim=(bottom, top), xlim=(0, None))
        panel.grid(color="0.9", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        if beyond:
            panel.text(0.98, 0.97, beyond, transform=panel.transAxes, ha="right", va="top",
                       fontsize="small", color="0.4")  # fmt: skip
    panels[0].set_ylabel("validation loss (nats per byte)")
    figure.suptitle(heading(drawn), fontsize="medium")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="outside lower center", ncols=1 + (len(drawn) > 2), frameon=False
    )
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=200)
    write(path, content.getvalue())
    return len(content.getvalue())


def legend(run: Record) -> str:
    unfinished = "" if run.is_finished else ", unfinished"
    return f"{run.mode or 'run'}{unfinished}: {run.name}".replace("$", r"\$")


def heading(records: list[Record]) -> str:
    """The data and the models of a plot in words."""
    data = {run.data: None for run in records if run.data}
    names = ("N_LAYER", "N_EMBD", "BLOCK_SIZE")
    shapes = {tuple(run.config.get(name, "?") for name in names): None for run in records}
    models = (f"{layers} layers of width {width}, context {T}" for layers, width, T in shapes)
    parts = (" and ".join(data), " and ".join(models))
    return ": ".join(part for part in parts if part).replace("$", r"\$")


def limits(records: list[Record]) -> tuple[float, float, str]:
    """Limits of the axis of losses, and words for what lies above them.

    The first losses are so high that they would press what matters into a flat line: when a tenth
    of each run's steps is enough to leave most of the range, the axis begins there.
    """
    every = [(e, r) for r in records for e in r.evaluations if math.isfinite(e.val_loss)]
    if not every:
        return 0.0, 1.0, ""
    late = [e for e, run in every if e.step >= run.evaluations[-1].step / 10 and e.step > 0]
    low = min(e.val_loss - e.val_error for e, _ in every)
    full = max(e.val_loss + e.val_error for e, _ in every)
    high = max((e.val_loss + e.val_error for e in late), default=full)
    if full - low < 1.5 * (high - low):
        high = full
    margin = 0.04 * (high - low) or 0.1
    above = [e.val_loss for e, _ in every if e.val_loss > high + margin]
    words = f"above the axis: {len(above)} losses up to {max(above):.2f}" if above else ""
    return low - margin, high + margin, words


def write(path: Path, content: bytes) -> None:
    """Write a file beside `path` and rename it into place. Raises RecordError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RecordError(f"{path} cannot be written: {error.strerror}") from error


def say(*lines: str) -> None:
    for line in lines:
        print(printable(line), flush=True)


def fail(message: str) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
