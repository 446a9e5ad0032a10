"""RESULTS.md, the plots and the README's figures, from the files in benchmarks/results/ alone.

    python benchmarks/report.py

Of rows that say the same in words, those of a machine's newest file count. In other documents the
text between `<!-- made: NAME -->` and `<!-- end -->` is made by the function of BLOCKS with that
name: tables of results, and tables of variables from trainer/settings.py.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import results
from benchmarks.curves import RUNS
from benchmarks.results import ROOT, Row
from compare import dress, look, new_figure, picture
from files.writing import replacing
from trainer.settings import Config, GenerateConfig, Settings, help_table

REPORT = ROOT / "benchmarks" / "RESULTS.md"
PLOTS = ROOT / "benchmarks" / "plots"
DOCUMENTS = (ROOT / "README.md", ROOT / "LORA_USAGE.md")
BLOCK = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Found:
    """The rows of a benchmark that count, on one machine with one number of threads."""

    benchmark: str
    machine: str
    threads: int
    device: str
    files: list[dict[str, Any]] = field(default_factory=list)  # which they come from
    rows: list[Row] = field(default_factory=list)

    @property
    def place(self) -> str:
        """The machine in words."""
        if self.device != "cpu" or self.machine.endswith(f" {self.threads} cores"):
            return self.machine
        return f"{self.machine}, {self.threads} thread{'s' * (self.threads > 1)}"


FOUND_WORDS = ("operation",)  # what a benchmark finds in words, and does not ask for


def words_of(row: Row) -> tuple[tuple[str, str], ...]:
    """What a row says in words, which tells it from others."""
    words = [(name, value) for name, value in row.items() if isinstance(value, str)]
    return tuple(sorted((name, value) for name, value in words if name not in FOUND_WORDS))


def newest(files: Iterable[dict[str, Any]]) -> list[Found]:
    """The rows that count; `files` are in the order of their dates."""
    places: dict[tuple, Found] = {}
    groups: dict[tuple, dict[tuple, tuple[dict, list[Row]]]] = {}
    for file in files:
        key = (file["benchmark"], file["machine"], file["threads"])
        places.setdefault(key, Found(*key, file["device"]))
        own: dict[tuple, list[Row]] = {}
        for row in file["rows"]:
            own.setdefault(words_of(row), []).append(row)
        groups.setdefault(key, {}).update({words: (file, rows) for words, rows in own.items()})
    for key, place in places.items():
        for file, rows in groups[key].values():
            place.rows += rows
            if file not in place.files:
                place.files.append(file)
    return list(places.values())


# The report


@dataclass(frozen=True)
class Section:
    """How the rows of a benchmark are shown.

    Rows that differ in `by` have tables of their own. With `across`, the values of this name are
    the columns, and each of `figures` has a table. Without it each of `figures`, or every name, has
    a column.
    """

    title: str
    text: str
    by: str | None = None
    across: str | None = None
    figures: tuple[str, ...] = ()
    plot: str | None = None


SECTIONS = {
    "runs": Section(
        "The README's three runs",
        "`python benchmarks/curves.py`. A base is trained on Python's sources, and fine-tuned on "
        "Python's language reference with LoRA and with all its weights. Losses are nats per byte, "
        "on the same windows in all runs with the same data. `old` is the base by the recipe that "
        "was the default before Muon.",
        plot="curves.svg",
    ),
    "bigram": Section(
        "A bigram model",
        "`python benchmarks/bigram.py`: what a model must beat to have learned anything, in nats "
        "per byte.",
    ),
    "quality": Section(
        "What LoRA learns and forgets",
        "`python benchmarks/quality.py`. A base is adapted by each method at equal tokens, each at "
        "its best learning rate. Losses are nats per byte, means over seeds +- standard deviation. "
        "What is forgotten is the rise of the loss on the base's own text. Unless its name says "
        "otherwise, a method has alpha = 2 rank, `DROPOUT=0`, and LoRA `LORA_PLUS_RATIO=8`.",
        by="corpus",
        figures=(
            "method", "learning_rate", "loss", "loss_above_full", "loss_forgotten", "peak_mib",
            "file_mib",
        ),
        plot="quality.svg",
    ),
    "recipe": Section(
        "The defaults of training",
        "`python benchmarks/recipe.py`. Short runs from random weights on python-code, and on "
        "python-docs from bases trained there, which ask one question each. Losses are nats per "
        "byte at the end, and `old_loss` that on python-code. Where nothing else is said, a run "
        "has the defaults of `training.py` and `DROPOUT=0`.",
        by="question",
    ),
    "step_time": Section(
        "Step time and memory by method",
        "`python benchmarks/step_time.py`. Rank 8 on every linear, the embeddings train, fused "
        "AdamW; all methods take turns in one process. Ratios are medians of the rounds with their "
        "quartiles; below 1 is faster than full fine-tuning. `floor` trains the embeddings alone. "
        "`autograd` is x W^T + s (x A^T) B^T left to autograd. Memory is the peak of a process of "
        "its own, on a GPU that of torch.",
        across="size",
        figures=("step_to_full", "step_ms", "peak_mib"),
        plot="step_time.svg",
    ),
    "families": Section(
        "Published shapes beside PEFT",
        "`python benchmarks/families.py`. Random weights of the published shapes, rank 8 on all "
        "linears of the blocks, beside PEFT on the model of `transformers` with the same weights "
        "and tokens. Below 1 is faster, or smaller, than what stands beside it.",
    ),
    "sft": Section(
        "Whole fine-tunings beside TRL",
        "`python benchmarks/sft.py`. Random weights of the published shapes, 20 steps, three "
        "evaluations and two checkpoints, beside TRL's SFTTrainer with the same text and settings. "
        "`time` is that of the loop, `whole` that of the process.",
    ),
    "gpt2": Section(
        "GPT-2 at its real size",
        "`python benchmarks/gpt2.py`. 124M random weights; the embeddings train.",
    ),
    "loop_speed": Section(
        "The whole loop beside a plain trainer",
        "`python benchmarks/loop_speed.py`. Tokens per second of training, evaluation and writing "
        "files, over those of a plain trainer of nanoGPT's kind in float32, which is part of the "
        "benchmark. Above 1 is faster; medians and range of the rounds.",
    ),
    "start": Section(
        "Starting",
        "`python benchmarks/start.py`. Seconds of a process from its start to its end, or to the "
        "log's line of the first step of the default model. A second run on the same chats finds "
        "their tokens.",
    ),
    "whole_runs": Section(
        "Whole runs beside a plain trainer",
        "`python benchmarks/loop_speed.py --to-the-end`: the final loss on the same windows.",
    ),
    "variables": Section(
        "What variables cost and change",
        "`python benchmarks/variables.py`. Whole runs of `training.py`. Ratios are medians of the "
        "rounds, and their range; losses are means, with the mean difference from the first.",
    ),
    "memory": Section(
        "The announced memory beside the measured one",
        "`python benchmarks/memory.py`. `announced` is the log's line before the first weight is "
        "read, `peak` that of the process, on a GPU that of torch.",
    ),
    "packing": Section(
        "Packed records beside plain text",
        "`python benchmarks/packing.py`. `masked` are records with a mask of who sees whom at any "
        "block size.",
    ),
    "head": Section(
        "The head with its loss",
        "`python benchmarks/head.py`. All logits at once (`plain`) beside chunks of tokens. "
        "Memory is what a call adds.",
    ),
    "serving": Section(
        "Generating, and handling adapters",
        "`python benchmarks/serving.py`. Rank 8 on every linear, float32.",
    ),
    "profile": Section(
        "Where the time of a step goes",
        "`python benchmarks/profile_step.py`, with torch's profiler: the operations that take most "
        "of a step. `mm`, `addmm`, `bmm` and their like are the products of matrices.",
        by="model",
    ),
    "parameters": Section(
        "Parameters",
        "`python benchmarks/parameters.py`. What adapters of each rank have, and what trains in "
        "percent of all parameters.",
        by="embeddings",
    ),
    "cpu_operations": Section(
        "Single operations on a CPU",
        "`python benchmarks/cpu_operations.py`. Milliseconds, forward and backward, medians.",
        by="section",
        across="form",
        figures=("time_ms", "error"),
    ),
}  # fmt: skip


def report(found: Sequence[Found]) -> str:
    """RESULTS.md."""
    parts = [
        "# Results",
        "Made by `python benchmarks/report.py` from the files in [results](results), which have "
        "every figure with its command, commit, date, machine and versions. Each script writes "
        "such a file. Of the same rows a machine's newest count. `load` is the part of the cores "
        "that was busy in the minute before the start: figures of a busy machine are rougher. "
        "Figures that are transcribed were measured before the scripts wrote files.",
    ]
    for name, section in SECTIONS.items():
        places = [place for place in found if place.benchmark == name]
        if not places:
            continue
        parts += [f"## {section.title}", section.text]
        if section.plot is not None:
            parts.append(f"![{section.title}](plots/{section.plot})")
        for place in places:
            parts.append(f"### {place.place}")
            parts.append("\n".join(origin(file) for file in place.files))
            parts += tables(section, place.rows)
    return "\n\n".join(parts) + "\n"


def origin(file: dict[str, Any]) -> str:
    """Where and when the rows of a file were measured, as an item of a list."""
    versions = [f"{name} {version}" for name, version in file["versions"].items()]
    words = [file["date"][:10], f"commit {file['commit']}", *versions]
    if file.get("load_before") is not None:
        words.append(f"load {file['load_before']:.2f}")
    if file.get("transcribed"):
        words.append("transcribed")
    return f"- {', '.join(words)}: `{file['command']}`"


def tables(section: Section, rows: Sequence[Row]) -> list[str]:
    """The tables of a section with their headings, in Markdown."""
    if section.by is not None:
        values = dict.fromkeys(row[section.by] for row in rows)
        groups = {value: [row for row in rows if row[section.by] == value] for value in values}
    else:
        groups = {"": list(rows)}
    parts = []
    for own in groups.values():
        words, own = without_common(own, section.across)
        parts += [f"With {words}:"] if words else []
        if section.across is None:
            parts.append(results.table([chosen(row, section.figures) for row in own]))
            continue
        for name in section.figures:
            if any(row.get(name) is not None for row in own):
                heading = results.heading(name)
                parts += [
                    f"{heading[0].upper()}{heading[1:]}:",
                    results.table(pivoted(own, section.across, name)),
                ]
    return parts


def without_common(rows: Sequence[Row], across: str | None) -> tuple[str, list[Row]]:
    """What all rows say alike, in words, and the rows without it."""
    if len(rows) == 1:
        return "", list(rows)
    shared = dict(set.intersection(*(set(words_of(row)) for row in rows)))
    shared.pop(across, None)
    names = [name for name in rows[0] if name in shared]  # in the row's own order
    words = ", ".join(f"{results.heading(name)} {shared[name]}" for name in names)
    return words, [{name: v for name, v in row.items() if name not in shared} for row in rows]


def chosen(row: Row, names: Sequence[str]) -> Row:
    """The row with these names alone, in this order; the whole row where there are none."""
    if not names:
        return row
    ends = ("", "_low", "_high", "_sd")
    return {name + end: row[name + end] for name in names for end in ends if name + end in row}


def pivoted(rows: Sequence[Row], across: str, name: str) -> list[Row]:
    """One figure of the rows, with the values of `across` as columns."""
    lines: dict[tuple, Row] = {}
    for row in rows:
        if row.get(name) is not None:
            text = {k: v for k, v in row.items() if isinstance(v, str) and k != across}
            line = lines.setdefault(tuple(text.items()), text)
            line[row[across]] = results.cell(row, name)
    return list(lines.values())


# The plots


def draw_curves(found: Sequence[Found]) -> bytes:
    """Validation loss against time: a panel for each machine, a line for each run."""
    figure, panels = grid_of(found)
    for place, panel in panels:
        runs: dict[tuple, list[Row]] = {}
        shown = [row for row in place.rows if "variables" not in row]  # as a user starts them
        for row in shown:
            runs.setdefault(words_of(row), []).append(row)
        longest = max(row["time_s"] for row in shown)
        unit, seconds = ("minutes", 60) if longest > 120 else ("seconds", 1)
        for i, rows in enumerate(runs.values()):
            x, y = ([row[name] for row in rows] for name in ("time_s", "loss"))
            label = f"{rows[0]['run']}, on {rows[0]['data']}"
            panel.plot([s / seconds for s in x], y, label=label, markersize=4, **look(i))
        # The first losses, of random weights, would press what matters into a flat line.
        late = [
            row["loss"] for row in shown if row["step"] > 0 or row["run"] not in ("base", "old")
        ]
        panel.set_ylim(min(late) - 0.05, max(late) + 0.05)
        panel.set(title=place.place, xlabel=unit)
    panels[0][1].set_ylabel("validation loss, nats per byte")
    return finished(figure, panels)


def draw_steps(found: Sequence[Found]) -> bytes:
    """Step time over that of full fine-tuning, by size of the model."""
    return draw_by_size(found, "step_to_full", "step time, full = 1")


def draw_memory(found: Sequence[Found]) -> bytes:
    """Peak memory by size of the model."""
    return draw_by_size(found, "peak_mib", "peak memory, MiB")


def draw_by_size(found: Sequence[Found], name: str, words: str) -> bytes:
    """A figure of the project's own models by their size: a panel for each machine and dtype."""
    groups = [
        dataclasses.replace(place, rows=rows)
        for place in found
        for dtype in dict.fromkeys(row["dtype"] for row in place.rows)
        if (rows := [r for r in own_models(place) if r["dtype"] == dtype and name in r])
    ]
    figure, panels = grid_of(groups)
    for place, panel in panels:
        sizes = list(dict.fromkeys(row["size"] for row in place.rows))
        for i, method in enumerate(METHODS):
            own = {r["size"]: r[name] for r in place.rows if r["method"] == method}
            if own:
                x = [sizes.index(size) for size in own]
                panel.plot(x, list(own.values()), label=METHODS[method], markersize=5, **look(i))
        panel.set_xticks(range(len(sizes)), [size.replace(", ", "\n") for size in sizes])
        panel.set(title=f"{place.place}, {place.rows[0]['dtype']}", ylabel=words)
    return finished(figure, panels)


def own_models(place: Found) -> list[Row]:
    """The rows of step_time.py that are not of another project's model."""
    return [row for row in place.rows if not row["size"].startswith("llama")]


def draw_quality(found: Sequence[Found]) -> bytes:
    """What each method learned beside what it forgot: a panel for each machine and corpus.

    A point that is close to another has no name.
    """
    groups = [
        dataclasses.replace(place, rows=rows)
        for place in found
        for corpus in dict.fromkeys(row["corpus"] for row in place.rows)
        if (rows := [r for r in place.rows if r["corpus"] == corpus and "loss_forgotten" in r])
    ]
    figure, panels = grid_of(groups, width=6.0)
    for place, panel in panels:
        named: list[tuple[float, float]] = []
        for row in place.rows:
            looks = look(0 if row["method"].startswith("full") else 1)
            errors = {"xerr": row.get("loss_forgotten_sd"), "yerr": row.get("loss_sd")}
            x, y = row["loss_forgotten"], row["loss"]
            panel.errorbar(x, y, **errors, **looks, elinewidth=0.6, linestyle="none")
            if all(abs(x - a) > 0.06 or abs(y - b) > 0.008 for a, b in named):
                named.append((x, y))
                place_of_name = {"textcoords": "offset points", "fontsize": "x-small"}
                panel.annotate(row["method"], (x, y), (4, 3), **place_of_name)
        title = f"{place.place}\n{place.rows[0]['corpus']}"
        panel.set(title=title, xlabel="forgotten: rise of the loss on the base's text, nats")
        panel.set_ylabel("loss on the new text, nats per byte")
        panel.margins(x=0.15)
    return finished(figure, panels)


METHODS = {  # of step_time.py
    "full": "full fine-tuning", "lora": "this LoRA", "peft": "PEFT", "loralib": "loralib",
    "autograd": "plain autograd", "floor": "embeddings only",
}  # fmt: skip
# By file: the benchmark whose rows are drawn, and how.
PICTURES: dict[str, tuple[str, Callable[[Sequence[Found]], bytes]]] = {
    "curves.svg": ("curves", draw_curves),
    "quality.svg": ("quality", draw_quality),
    "step_time.svg": ("step_time", draw_steps),
    "memory.svg": ("step_time", draw_memory),
}


def digest(places: Sequence[Found]) -> str:
    """What tells the rows of these places from others."""
    rows = json.dumps([(place.place, place.rows) for place in places])
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def grid_of(places: Sequence[Found], width: float = 4.2) -> tuple[Any, list[tuple[Found, Any]]]:
    """A figure with a panel for each of the places, at most three beside each other."""
    columns = min(3, len(places))
    rows = math.ceil(len(places) / columns)
    figure = new_figure(width * columns, 3.4 * rows + 0.4)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[len(places) :]:
        unused.remove()
    for panel in panels[: len(places)]:
        dress(panel)
        panel.title.set_fontsize("small")
    return figure, list(zip(places, panels, strict=False))


def finished(figure: Any, panels: Sequence[tuple[Found, Any]]) -> bytes:
    """The figure as SVG, with one legend for all panels."""
    lines = {}
    for _, panel in panels:
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    if lines:
        place = {"loc": "outside lower center", "ncols": min(3, len(lines)), "frameon": False}
        figure.legend(lines.values(), lines.keys(), **place)
    return picture(figure, "svg")


# What other documents have of it

# The variables that people change, and those of LoRA alone; `--help` has them all.
DOZEN = (
    "USE_LORA", "LORA_RANK", "RESUME", "DATA", "OUT_DIR", "BASE_CHECKPOINT", "ADAPTERS",
    "BASE_DTYPE", "BLOCK_SIZE", "BATCH_SIZE", "MAX_STEPS", "LEARNING_RATE",
)  # fmt: skip
OF_LORA = (
    "USE_LORA", "LORA_RANK", "LORA_ALPHA", "LORA_DROPOUT", "LORA_PLUS_RATIO", "LORA_TARGETS",
    "TRAIN_EMBEDDINGS",
)  # fmt: skip


def variables_table(kind: type[Settings], names: Sequence[str] = ()) -> str:
    """The variables of a script with these names, or all, as `--help` has them."""
    rows = [
        f"| `{name}` | {f'`{default}`' if default else ''} | {text} |"
        for name, default, text in help_table(kind)
        if not names or name in names
    ]
    return "\n".join(["| Variable | Default | |", "|---|---|---|", *rows])


def runs_table(found: Sequence[Found]) -> str:
    """The commands of curves.py, and on each machine how long they take and what they reach."""
    places = [place for place in found if place.benchmark == "runs"]
    columns = {
        f"{place.place}, {dtype}": [row for row in place.rows if row["dtype"] == dtype]
        for place in places
        for dtype in dict.fromkeys(row["dtype"] for row in place.rows)
    }
    rows = [
        {"command": f"`{command}`"}
        | {column: reached(found_rows, run) for column, found_rows in columns.items()}
        for run, command in RUNS.items()
    ]
    return results.table(rows)


def reached(rows: Sequence[Row], run: str) -> str:
    """How long a run of these took, its steps, and the loss that it reached; empty without it."""
    for row in rows:
        if row["run"] == run:
            minutes = row["time_s"] / 60
            words = f"{minutes:.1f} min" if minutes > 1.5 else f"{row['time_s']:.0f} s"
            return f"{words}, {row['steps']} steps, {row['final_loss']:.2f}"
    return ""


def row_of(found: Sequence[Found], benchmark: str, **words: str) -> tuple[Found, Row]:
    """The row that says this, of the machine with the newest file."""
    places = [place for place in found if place.benchmark == benchmark]
    for place in sorted(places, key=lambda p: max(f["date"] for f in p.files), reverse=True):
        for row in place.rows:
            if words.items() <= row.items():
                return place, row
    raise LookupError(f"no row of {benchmark} with {words}")


def outcomes_table(found: Sequence[Found]) -> str:
    """Six things that were reached, each with its machine."""
    rows = []

    def add(what: str, figures: str, place: Found) -> None:
        rows.append({"what was reached": what, "figure": figures, "on": place.place})

    size = {"size": "11M, 16x256"}
    place, lora = row_of(found, "step_time", method="lora", **size)
    _, peft = row_of([place], "step_time", method="peft", dtype=lora["dtype"], **size)
    figures = f"{lora['step_to_full']:.2f}; PEFT {peft['step_to_full']:.2f}"
    add(f"time of a LoRA step, 11M, {lora['dtype']}; full fine-tuning's is 1", figures, place)
    corpus = {"corpus": "python-docs, 100 steps"}
    place, row = row_of(found, "quality", method="rank 32", **corpus)
    figures = f"{row['loss_above_full']:+.3f} +- {row['loss_above_full_sd']:.3f} nats per byte"
    add("loss of LoRA, rank 32, above full fine-tuning at equal tokens", figures, place)
    parts = {
        "LoRA": ("rank 16", "rank 16, at weight 0.7"),
        "full": ("full", "full, 0.7 of the change"),
    }
    words = []
    for name, methods in parts.items():
        rows_of_parts = [row_of([place], "quality", method=m, **corpus)[1] for m in methods]
        whole, part = (row["loss_forgotten"] for row in rows_of_parts)
        words.append(f"{name} {whole:.2f}, at 0.7 of the change {part:.2f}")
    what = "rise of the loss on the base's own text, nats per byte"
    add(what, "; ".join(words), place)
    shape = {"model": "Llama-3.2-1B", "batch": "1x512", "dtype": "bfloat16"}
    place, row = row_of(found, "families", method="ours-nf4", beside="peft-nf4", **shape)
    figures = f"{row['step_ratio']:.2f} of the step, {row['peak_ratio']:.2f} of the memory"
    add("a 1B Llama in 4 bits on a CPU; PEFT with bitsandbytes is 1", figures, place)
    shape |= {"model": "Llama-3.1-8B", "batch": "1x2048", "grad_checkpoint": "off"}
    place, row = row_of(found, "families", method="ours-nf4", **shape)
    _, peft = row_of([place], "families", method="peft-nf4", **shape)
    step, peak = (row[name] / peft[name] for name in ("step_ms", "peak_mib"))
    figures = f"{step:.2f} of the step, {peak:.2f} of the memory"
    add("the same of an 8B Llama on a GPU, 2,048 tokens", figures, place)
    place, row = row_of(found, "whole_runs", method="ours, full")
    _, plain = row_of([place], "whole_runs", method="plain trainer", size=row["size"])
    figures = (
        f"{row['time_to_plain']:.2f} of its time; loss {row['loss']:.3f}, its {plain['loss']:.3f}"
    )
    add("a new model of 0.8M, beside a plain trainer of nanoGPT's kind", figures, place)
    return results.table(rows)


def curves(found: Sequence[Found]) -> str:
    """The picture of the three runs, where there are any."""
    words = "Validation loss against time of the three runs below"
    is_drawn = any(place.benchmark == "curves" for place in found)
    return f"![{words}](benchmarks/plots/curves.svg)" if is_drawn else ""


def chat_steps(found: Sequence[Found]) -> str:
    """How long a step of SmolLM2 takes on each machine, in a sentence."""
    shape = {"model": "SmolLM2-135M", "method": "ours", "batch": "4x256", "clock": "wall"}
    shape |= {"grad_checkpoint": "off", "compile": "off"}
    times: dict[str, list[str]] = {}
    for place in found:
        for row in place.rows:
            if place.benchmark == "families" and shape.items() <= row.items() and "step_ms" in row:
                ms = row["step_ms"]
                words = f"{ms / 1000:.{1 if ms > 500 else 3}f} s in {row['dtype']}"
                times.setdefault(place.place, []).append(words)
    if not times:
        return ""
    words = "; ".join(f"{' and '.join(each)} on {name}" for name, each in times.items())
    return f"A step of the chats' command, four blocks of 256 tokens, takes {words}."


BLOCKS: dict[str, Callable[[Sequence[Found]], str]] = {
    "curves": curves,
    "runs": runs_table,
    "outcomes": outcomes_table,
    "chat_steps": chat_steps,
    "variables": lambda _: variables_table(Config, DOZEN),
    "lora_variables": lambda _: variables_table(Config, OF_LORA),
    "generate_variables": lambda _: variables_table(GenerateConfig),
}


def filled(text: str, found: Sequence[Found]) -> str:
    """A document with its blocks as the results have them."""

    def made(match: re.Match) -> str:
        content = BLOCKS[match[2]](found)
        return match[1] + (f"{content}\n" if content else "") + match[3]

    return BLOCK.sub(made, text)


def documents(folder: Path = results.FOLDER) -> dict[Path, str]:
    """What every document should hold."""
    found = newest(results.read(folder))
    texts = {path: filled(path.read_text(encoding="utf-8"), found) for path in DOCUMENTS}
    return texts | {REPORT: report(found)}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for path, text in documents().items():
        with replacing(path) as file:
            file.write(text.encode())
    found = newest(results.read())
    PLOTS.mkdir(exist_ok=True)
    for name, (benchmark, draw) in PICTURES.items():
        places = [place for place in found if place.benchmark == benchmark]
        if places:
            with replacing(PLOTS / name) as file:
                file.write(draw(places) + f"<!-- {digest(places)} -->\n".encode())


if __name__ == "__main__":
    main()
